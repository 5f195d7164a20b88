"""Folders that nothing can be done with: every way in says the same of them, in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PACKED = "model-Q4_K_M.gguf"
WAYS = ("train", "check", "chat", "evaluate", "export", "plan", "selfcheck", "verify", "consolidate")
Way = Callable[[str, Path], str]


def _train(*flags: str) -> None:
    spec = importlib.util.spec_from_file_location("launched", ROOT / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(flags)


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Way:
    """What a way in answers to a folder."""
    data = tmp_path / "data.json"
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    data.write_text(json.dumps([{"id": "0", "conversations": talk}]))
    out = str(tmp_path / "out")

    def ask(way: str, folder: Path) -> str:
        name = str(folder)
        if way == "train":
            flags = ("--output_dir", out, "--use_cpu", "true", "--report_to", "none")
            with pytest.raises(UserError) as refused:
                _train("--model_name_or_path", name, "--data_path", str(data), *flags)
            return str(refused.value)
        flags = {
            "check": ["--model", name, "--data", str(data)],
            "chat": ["--model", name],
            "evaluate": ["--model", name, "--data", str(data), "--out", out],
            "export": ["--model_name_or_path", name, "--export_dir", out],
            "plan": [name],
            "selfcheck": [name],
            "verify": [name],
            "consolidate": ["--model_name_or_path", name, str(tmp_path), out],
        }[way]
        assert main([way, *flags]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return ask


@pytest.mark.parametrize("way", WAYS)
def test_weights_for_llama_cpp(said: Way, way: str, tiny, tmp_path: Path) -> None:
    """Alone, and beside a config.json."""
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / PACKED).write_bytes(b"GGUF")
    assert f"{folder} is quantised (its weights are {PACKED}): such weights can neither be" in said(way, folder)
    shutil.copy(tiny("v4_6") / "config.json", folder)
    assert "Use openbmb/MiniCPM-V-4.6 instead" in said(way, folder)


@pytest.mark.parametrize("way", WAYS)
def test_a_generation_that_is_not_known(said: Way, way: str, tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("v4_6"), tmp_path / "newer")
    config = {"model_type": "minicpmo", "version": "4.6", "architectures": ["MiniCPMO"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "unknown checkpoint: config.json has model_type='minicpmo', " in said(way, folder)
