"""evaluate --url against a small server that speaks the chat completions protocol on this machine."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune.__main__ import main
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.collate import pad
from finetune.evaluation.batched_generation import answer_batch, split_answer
from finetune.export.prompt_files import encoder_of
from finetune.models import load_model
from finetune.readers import read


class Server:
    """Answers by a function of the request; counts how many requests are there at once."""

    def __init__(self, owner: str) -> None:
        self.owner, self.requests, self.most = owner, [], 0
        self.answer: Any = lambda body: {"content": "red"}
        self._now, self._lock = 0, threading.Lock()
        self.together: threading.Barrier | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def reply(self, content: Any, status: int = 200) -> None:
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                model = {"id": "tuned", "object": "model", "created": 0, "owned_by": outer.owner}
                self.reply({"object": "list", "data": [model]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                    outer.requests.append(body)
                if outer.together is not None:
                    outer.together.wait(30)
                made = outer.answer(body)
                with outer._lock:
                    outer._now -= 1
                if "status" in made:
                    self.reply({"error": {"message": made["message"]}}, made["status"])
                    return
                message = {"role": "assistant", "content": made["content"]}
                choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": made.get("logprobs")}
                reply = {"id": "0", "object": "chat.completion", "created": 0, "model": "tuned", "choices": [choice]}
                self.reply({**reply, **made.get("more", {})})

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    made = Server(getattr(request, "param", ""))
    yield made
    made.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = []
    for number in range(4):
        Image.new("RGB", (60 + number, 40), (number, 0, 0)).save(tmp_path / f"{number}.jpg")
        turns = [{"role": "user", "content": f"<image>\nColour {number}?"}, {"role": "assistant", "content": "red"}]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def words(server: Server, data: Path, out: Path, *more: str) -> list[str]:
    return ["evaluate", "--url", server.url, "--data", str(data), "--out", str(out), *more]


def of(body: dict[str, Any]) -> list[Any]:
    content = body["messages"][-1]["content"]
    return [part.get("text", part["type"]) for part in content]


def test_every_metric_many_at_once_and_the_same_files(server: Server, data: Path, tmp_path: Path, capsys) -> None:
    server.together = threading.Barrier(4)
    out = tmp_path / "out"
    assert main(words(server, data, out, "--max_new_tokens", "7", "--metric", "exact")) == 0
    said = capsys.readouterr().out
    assert "exact        1.0000" in said
    assert server.most == 4
    assert json.loads((out / "metrics.json").read_text())["model"] == f"tuned at {server.url}"
    assert (out / "report.html").is_file()
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(row["index"], row["prediction"], row["scores"]["exact"]) for row in rows] == [
        (number, "red", 1.0) for number in range(4)
    ]
    for body in server.requests:
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("tuned", 7, 0)
        kind, text = of(body)
        number = int(text.removeprefix("\nColour ").removesuffix("?"))
        url = body["messages"][-1]["content"][0]["image_url"]["url"]
        sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        assert kind == "image_url"
        assert sent.tobytes() == Image.open(tmp_path / f"{number}.jpg").convert("RGB").tobytes()


def test_it_goes_on_where_it_was_interrupted(server: Server, data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"

    def fails(body: dict[str, Any]) -> dict[str, Any]:
        return {"status": 400, "message": "too long"} if "2?" in of(body)[-1] else {"content": "red"}

    server.answer = fails
    given = words(server, data, out, "--concurrency", "1")
    assert main(given) == 2
    assert f"{server.url} answers 400: " in (failed := capsys.readouterr().err)
    assert "record 2" in failed or "[2]" in failed
    asked = len(server.requests)
    server.answer = lambda body: {"content": "blue"}
    assert main(given) == 0
    later = [int(of(body)[-1].removeprefix("\nColour ")[0]) for body in server.requests[asked:]]
    answers = [json.loads(line)["prediction"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert later == [number for number, answer in enumerate(answers) if answer == "blue"]
    assert 2 in later
    assert 0 not in later
    assert main([*given, "--max_new_tokens", "3"]) == 2
    assert "max_new_tokens was 128 and is 3" in capsys.readouterr().err


@pytest.mark.parametrize("server", ["llamacpp", "vllm", "other"], indirect=True)
@pytest.mark.parametrize("family", ["v2_6", "v4_6"])
def test_prompts_are_written_for_the_server(tiny, server: Server, data: Path, tmp_path: Path, family: str) -> None:
    assert main(words(server, data, tmp_path / "out", "--model", str(tiny(family)), "--limit", "1")) == 0
    own, body = family == "v2_6", server.requests[0]
    wanted = {
        "llamacpp": ["<image_id>0</image_id>", "image_url", "\nColour 0?"],
        "vllm": ["(<image>./</image>)\nColour 0?", "image_url"] if own else ["image_url", "\nColour 0?"],
        "other": ["image_url", "\nColour 0?"],
    }
    assert of(body) == wanted[server.owner]
    assert ("chat_template_kwargs" in body) == (family == "v4_6")
    assert ("stop_token_ids" in body) == ("repetition_penalty" in body) == (server.owner == "vllm")
    assert ("repeat_penalty" in body) == (server.owner == "llamacpp")
    without = words(
        server, data, tmp_path / "ids", "--model", str(tiny(family)), "--limit", "1", "--use_image_id", "false"
    )
    assert main(without) == 0
    assert "<image_id>" not in json.dumps(server.requests[-1]["messages"])


def in_process(folder: Path, data: Path) -> Any:
    """A server's answers by the model itself, with ids and log-probabilities as vLLM gives them."""
    base = resolve_base(str(folder))
    model, encoder = load_model(base.folder, dtype=torch.float32).eval(), encoder_of(base)
    prompts = [split_answer(sample)[0] for sample in read(data)]

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        prompt = prompts[int(of(body)[0].partition("Colour ")[2][0])]
        example = encoder.encode(prompt, generate=True)
        batch = {key: value for key, value in pad([example], encoder.pad_id).items() if key != "labels"}
        with torch.no_grad():
            own = model(**batch).logits[0, -1].log_softmax(-1)
        top = own.topk(body["top_logprobs"])
        entries = [
            {"token": f"token_id:{number}", "logprob": value, "bytes": None}
            for number, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        content = [{**entries[0], "top_logprobs": entries}]
        text = answer_batch(model, encoder.tokenizer, encoder, [prompt], max_new_tokens=body["max_tokens"])[0]
        ids = example.input_ids.tolist()
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        more = {"prompt_token_ids": ids, "usage": usage} if body["return_token_ids"] else {}
        return {"content": text, "logprobs": {"content": content, "refusal": None}, "more": more}

    return answer


def compared(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "comparison.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("server", ["vllm"], indirect=True)
def test_compare_proves_that_what_is_served_is_the_model(tiny, server, data, tmp_path, capsys) -> None:
    folder, out = tiny("v2_6"), tmp_path / "out"
    same = in_process(folder, data)
    server.answer = same
    more = ("--compare", str(folder), "--max_new_tokens", "4", "--dtype", "float32", "--device", "cpu")
    assert main(words(server, data, out, *more)) == 0
    said = capsys.readouterr().out
    assert "compared   same: prompts 4 of 4 equal (by ids), first token " in said
    assert "answers 4 of 4 equal" in said
    rows = compared(out)
    assert all(row["prompt_equal"] and row["ids_told"] and row["answers_equal"] for row in rows)
    assert max(row["first_token"] for row in rows) < 1e-4
    first = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert first["prediction"] == first["prediction_base"]

    def another_prompt(body: dict[str, Any]) -> dict[str, Any]:
        made = same(body)
        made["more"]["prompt_token_ids"] = made["more"]["prompt_token_ids"][3:]
        return made

    def cut_within_a_character(body: dict[str, Any]) -> dict[str, Any]:
        made = same(body)
        return {**made, "content": f"{made['content']}\ufffd"}

    def other_weights(body: dict[str, Any]) -> dict[str, Any]:
        made = same(body)
        made["logprobs"]["content"][0]["top_logprobs"][3]["logprob"] -= 0.5
        return made

    def silent(body: dict[str, Any]) -> dict[str, Any]:
        return {"content": same(body)["content"]}

    for number, (answer, status, said_of_it) in enumerate(
        [
            (another_prompt, 3, "compared   prompts differ: prompts 0 of 4 equal (by ids)"),
            (cut_within_a_character, 0, "answers 4 of 4 equal"),
            (other_weights, 3, "compared   first tokens differ: prompts 4 of 4 equal"),
            (silent, 0, "compared   unknown: prompts not told, first token not told, answers 4 of 4 equal"),
            (lambda body: {"content": "no"}, 3, "compared   answers differ: prompts not told"),
        ]
    ):
        server.answer = answer
        assert main(words(server, data, tmp_path / str(number), *more)) == status
        assert said_of_it in capsys.readouterr().out
    server.answer = other_weights
    assert main(words(server, data, tmp_path / "wide", *more, "--tolerance", "0.6")) == 0


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--compare", "base"), "--compare base is the model here without its adapter"),
        (("--compare", "a", "--model", "a"), "remove --model"),
        (("--max_slice_nums", "2", "--dtype", "float32"), "--dtype, --max_slice_nums: no effect on a server"),
        (("--tolerance", "1"), "--tolerance: no effect on a server"),
        (("--concurrency", "0"), "--concurrency 0: it must be at least 1"),
        (("--served_model", "other"), "--served_model other: "),
    ],
)
def test_flags_that_do_not_fit(server, data, tmp_path, capsys, more, why) -> None:
    assert main(words(server, data, tmp_path / "out", *more)) == 2
    assert why in capsys.readouterr().err


def test_what_is_missing_is_named(server, data, tmp_path, capsys, monkeypatch) -> None:
    assert main(["evaluate", "--model", "m", "--data", str(data), "--concurrency", "2"]) == 2
    assert "--concurrency: no effect without --url" in capsys.readouterr().err
    assert main(["evaluate", "--data", str(data)]) == 2
    assert "--model is missing" in capsys.readouterr().err
    server.close()
    assert main(words(server, data, tmp_path / "out")) == 2
    assert f"no server answers at {server.url}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(words(server, data, tmp_path / "out")) == 2
    assert "--url needs the openai client" in (said := capsys.readouterr().err)
    assert "pip install -e '.[served]'" in said


def test_a_video_is_not_sent(server, tmp_path, capsys) -> None:
    turns = [{"role": "user", "content": "<video>\nWhat?"}, {"role": "assistant", "content": "A dog."}]
    (tmp_path / "v.mp4").write_bytes(b"")
    record = {"id": "0", "video": "v.mp4", "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    assert main(words(server, tmp_path / "data.json", tmp_path / "out")) == 2
    assert "--url sends images; remove the record" in capsys.readouterr().err
    assert server.requests == []
