"""--push_to_hub against a stand-in for the hub: what is uploaded, when, and what is said where it cannot be."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from transformers.trainer_utils import HubStrategy

from finetune.checkpoints.hub_upload import HubUpload
from finetune.run import train
from finetune.utils.errors import ArgumentError, NotSavedError


class Hub(ThreadingHTTPServer):
    """Takes commits; refuses what ``refused`` is part of."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.refused = "nothing"
        self.address = f"http://127.0.0.1:{self.server_port}"


class Requests(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.refused in self.path:
            self._answer({"error": "You have no right to write here"}, 403)
        else:
            self._answer({"id": "me/x", "name": "me", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while (size := int(self.rfile.readline(), 16)) != 0:
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refused in self.path:
            self._answer({"error": "You have no right to write here"}, 403)
        elif "preupload" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            summary = next(entry["value"]["summary"] for entry in entries if entry["key"] == "header")
            files = {
                entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
                for entry in entries
                if entry["key"] == "file"
            }
            self.server.commits.append((summary, files))
            self._answer({"commitUrl": f"{self.server.address}/me/x/commit/{0:040}", "commitOid": "0" * 40})
        else:
            self._answer({"url": f"{self.server.address}/me/x", "name": "me/x", "id": "me/x"})

    def _answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.constants.ENDPOINT"):
        monkeypatch.setattr(name, server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name, value in {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_made_up", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_uploads_its_checkpoints_and_its_verified_result(hub, tiny, demo_data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = train(
        nproc=1,
        model_name_or_path=tiny("v2_0"),
        data_path=demo_data / "train.json",
        output_dir=tmp_path / "out",
        use_lora=True,
        max_steps=1,
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/x",
        report_to="none",
    )
    assert result.verified
    assert result.values["uploaded"].startswith(f"{hub.address}/me/x/commit/")
    assert [summary for summary, _ in hub.commits] == ["checkpoint-1", "Result"]
    for _, files in hub.commits:
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(files)
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", "report.html")) or "/" in name]
    files = hub.commits[-1][1]
    assert files["adapter_model.safetensors"] == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    card = files["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "peft"}, "the base is a folder: the hub knows no model of that name"
    assert "AutoPeftModel.from_pretrained" in text
    assert f"| training samples | {len(json.loads((demo_data / 'train.json').read_text()))} |" in text
    assert "| optimizer steps | 1 |" in text
    assert "| `use_lora` | True |" in text
    assert str(demo_data) not in card
    assert card == (tmp_path / "out" / "README.md").read_text()


def test_an_account_without_the_right_is_said_before_training(hub) -> None:
    hub.refused = "/api/"
    with pytest.raises(ArgumentError, match=r"me/x cannot be created or written: .*no right to write here.*hf auth"):
        HubUpload("me/x", HubStrategy.END).create()


def test_a_result_that_cannot_be_uploaded_is_complete_in_its_folder(hub, tmp_path) -> None:
    (tmp_path / "README.md").write_text("a card")
    upload = HubUpload("me/x", HubStrategy.END)
    upload.create()
    hub.refused = "commit"
    with pytest.raises(NotSavedError, match=f"complete in {tmp_path}, .*no right.* hf upload me/x {tmp_path}"):
        upload.result(tmp_path)


def test_a_hub_that_cannot_be_reached(hub, monkeypatch) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ArgumentError, match="me/x cannot be created or written"):
        HubUpload("me/x", HubStrategy.END).create()


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        (HubStrategy.END, []),
        (HubStrategy.EVERY_SAVE, ["README.md"]),
        (HubStrategy.CHECKPOINT, ["last-checkpoint/README.md", "last-checkpoint/optimizer.pt"]),
        (HubStrategy.ALL_CHECKPOINTS, ["checkpoint-7/README.md", "checkpoint-7/optimizer.pt"]),
    ],
)
def test_checkpoints_by_strategy(hub, tmp_path, strategy, names) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    for name in ("README.md", "optimizer.pt", "training_args.bin"):
        (folder / name).write_text("text")
    upload = HubUpload("me/x", strategy)
    upload.checkpoint(folder)
    upload.result(tmp_path)
    assert sorted(name for summary, files in hub.commits if summary == "checkpoint-7" for name in files) == names
