"""Help on flags comes from source text and says what the dataclasses say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from finetune.arguments.flag_help import asked_help, help_text
from finetune.arguments.flag_names import own_flags, transformers_flags
from finetune.arguments.parse import GROUPS
from finetune.commands.train import main as train

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "numpy", "peft", "deepspeed"}


def listed(text: str) -> list[str]:
    return [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]


def test_every_flag_is_listed_once_with_everything():
    names = listed(help_text("finetune.py", everything=True))
    declared = {entry.name for group in GROUPS for entry in fields(group) if entry.init}
    assert sorted(names) == sorted(declared)


def test_help_lists_our_own_flags_and_the_usual_ones():
    names = listed(help_text("finetune.py"))
    assert set(own_flags()) <= set(names)
    assert {"num_train_epochs", "deepspeed", "save_steps", "gradient_accumulation_steps"} <= set(names)
    assert "fsdp" not in names
    assert len(names) == len(set(names))


def test_what_the_source_says_is_what_the_dataclasses_say():
    flags = {**transformers_flags(), **own_flags()}
    for entry in [entry for group in GROUPS for entry in fields(group) if entry.init]:
        flag = flags[entry.name]
        if flag.help is not None:
            assert flag.help == entry.metadata["help"], entry.name
        if entry.name in own_flags():
            assert flag.help is not None
            assert flag.choices == tuple(entry.metadata.get("choices") or flag.choices)
            assert flag.default == (None if entry.default is MISSING else repr(entry.default)), entry.name


@pytest.mark.parametrize(
    ("words", "shown", "hidden"),
    [
        (["--help"], "--vision_lr X", "--fsdp TEXT"),
        (["x.yaml", "-h"], "", "--fsdp"),
        (["--help_all"], "--fsdp TEXT", ""),
    ],
)
def test_help_needs_nothing_heavy(words, shown, hidden):
    code = "import sys; from finetune.arguments.flag_help import asked_help; print(asked_help(sys.argv[1:]))"
    code += "\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    *text, modules = done.stdout.splitlines()
    assert any(shown in line for line in text)
    assert not hidden or not any(hidden in line for line in text)
    assert not HEAVY & {name.partition(".")[0] for name in modules.split()}


def test_the_script_prints_it_and_ends_well():
    done = subprocess.run(
        [sys.executable, "finetune.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: finetune.py [FILE.yaml] --model_name_or_path")
    assert "--help_all lists the other flags of transformers too" in " ".join(done.stdout.split())


def test_the_command_lists_everything_too(capsys):
    assert train(["--help_all"]) == 0
    assert "--fsdp TEXT" in capsys.readouterr().out


def test_no_help_was_asked_for():
    assert asked_help(["--lora_r", "8"]) is None
