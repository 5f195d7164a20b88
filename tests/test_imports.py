"""Importing the package is cheap, and ``python -m finetune`` answers before anything heavy is loaded."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from made_adapters import make_adapter, save

import finetune
from finetune.__main__ import COMMANDS, main
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "torchvision", "transformers", "deepspeed", "peft", "accelerate", "timm", "numpy"}


def modules_after(code: str) -> set[str]:
    """The top-level modules loaded by a fresh interpreter that runs ``code``."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_the_package_is_the_package() -> None:
    """Without ``finetune/__init__.py``, ``import finetune`` beside finetune.py finds the script."""
    assert (ROOT / "finetune" / "__init__.py").is_file()
    assert finetune.__file__ is not None
    assert Path(finetune.__file__).name == "__init__.py"


@pytest.mark.parametrize(
    "module",
    [
        "finetune",
        "finetune.sample",
        "finetune.families",
        "finetune.media.slicing",
        "finetune.templates",
        "finetune.readers",
        "finetune.runtime.distributed",
        "finetune.runtime.imports",
        "finetune.runtime.waiting_process",
        "finetune.__main__",
    ],
)
def test_import_is_cheap(module: str) -> None:
    assert not modules_after(f"import {module}") & HEAVY


def test_listing_the_commands_is_cheap() -> None:
    assert not modules_after("from finetune.__main__ import main; assert main(['--help']) == 0") & HEAVY


def test_checking_data_needs_no_torch(tiny, demo_data) -> None:
    """A check decodes images and reads model and tokenizer; torch and the libraries of training stay out."""
    words = ["check", "--model_name_or_path", str(tiny("v2_6")), "--data_path", str(demo_data / "train.json")]
    loaded = modules_after(f"from finetune.__main__ import main; assert main({words!r}) == 0")
    # Some versions of transformers import more for a tokenizer alone.
    comes_with_tokenizers = modules_after("from transformers import PreTrainedTokenizerFast")
    assert not loaded & ({"torch", "accelerate", "sympy"} - comes_with_tokenizers)
    assert not loaded & {"peft", "deepspeed", "pandas"}


@pytest.mark.parametrize("command", ["evaluate", "chat"])
def test_a_model_that_is_not_in_4_bit_needs_no_bitsandbytes(tiny, demo_data, tmp_path, command):
    pytest.importorskip("bitsandbytes")
    adapter = save(make_adapter(tiny("v2_6"), "v2_6"), tmp_path / "adapter")
    data = ["--data", str(demo_data / "eval.json"), "--out", str(tmp_path / "out"), "--limit", "1"]
    words = ["finetune", command, "--model", str(adapter), "--device", "cpu", "--max_new_tokens", "1"]
    code = f"import sys; sys.argv = {[*words, *data * (command == 'evaluate')]!r}\n"
    code += "from finetune.runtime import outcome; outcome.exit_after_handlers = print\n"
    loaded = modules_after(f"{code}from finetune.__main__ import console_script; console_script()")
    assert "peft" in loaded
    assert "bitsandbytes" not in loaded


def test_models_registers_with_transformers() -> None:
    """The counterpart: the network is what costs, and it says so by its name."""
    assert {"torch", "transformers"} <= modules_after("import finetune.models")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_commands_are_listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert f"  {name} " in shown
        assert summary in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"finetune.commands.{name.replace('-', '_')}")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert f"finetune {name}" in capsys.readouterr().out, "the usage line names the command as it is typed"


def test_every_command_file_is_listed() -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "finetune" / "commands").glob("*.py") if _is_command(path)}
    assert files == set(COMMANDS)


def _is_command(path: Path) -> bool:
    return "\ndef main(" in path.read_text(encoding="utf-8")


def test_arguments_and_status_are_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[list[str]] = []

    class Module:
        @staticmethod
        def main(argv: list[str]) -> int:
            received.append(argv)
            return 7

    monkeypatch.setitem(sys.modules, "finetune.commands.demo_data", Module)
    assert main(["demo-data", "--out", "x", "--help"]) == 7
    assert received == [["--out", "x", "--help"]]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(UserError("no such folder: x"), 2, "error: no such folder: x\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_user_errors_have_no_traceback(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Module:
        @staticmethod
        def main(argv: list[str]) -> int:
            raise error

    monkeypatch.setitem(sys.modules, "finetune.commands.verify", Module)
    assert main(["verify", "x"]) == status
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("typed", "hint"), [("demo_dat", "Did you mean 'demo-data'?"), ("xyzzy", "Commands: train, init, tiny,")]
)
def test_unknown_command(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    shown = capsys.readouterr().err
    assert repr(typed) in shown
    assert hint in shown


def test_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "demmo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "Did you mean 'demo'?" in done.stderr


@pytest.mark.parametrize("words", ["--help", "plan --help", "plan v2_6 --method lora"])
def test_a_reader_that_has_enough_ends_a_command_quietly(words):
    command = f"{sys.executable} -m finetune {words} | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr
