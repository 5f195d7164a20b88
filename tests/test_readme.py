"""Every command, record and snippet of README.md is run here; a block this file does not know fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = ("--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--dataloader_num_workers", "0")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, flags=re.MULTILINE | re.DOTALL)
    return ["\n".join(line.removeprefix(indent) for line in body.splitlines()) for indent, body in found]


def commands() -> list[str]:
    lines = [line.partition(" #")[0].strip() for block in blocks("shell") for line in block.splitlines()]
    inline = re.findall(r"`((?:sh|python|make) [^`]+)`", README)
    # "<command>" is the name of all of them; those of the README are run.
    return list(dict.fromkeys(line for line in [*lines, *inline] if line and "<command>" not in line))


def run(command: list[str], cwd: Path, **env: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **env,
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tiny, demo_data, tmp_path_factory) -> Path:
    """A user's directory after `sh finetune_lora.sh` with the default OUTPUT_DIR."""
    folder = tmp_path_factory.mktemp("user")
    env = {"MODEL": str(tiny("llama3_v2_5")), "DATA": str(demo_data / "train.json")}
    run(["sh", str(ROOT / "finetune_lora.sh"), *SHORT], folder, **env)
    return folder


def test_commands(place, demo_data):
    assert len(commands()) > 8
    for command in commands():
        words = command.split()
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert words[1] in targets, command
        elif re.fullmatch(r'(MODEL|DATA|EVAL_DATA)="[^"]*"', command):
            check_edited_launchers(command, place)
        elif words[0] == "sh":
            printed = run(
                ["sh", str(ROOT / words[1]), *words[2:]], place, DRY_RUN="1", DATA=str(demo_data / "train.json")
            )
            assert str(ROOT / "finetune.py") in printed
            assert all(word in printed for word in words[2:]), command
        elif words[0] == "torchrun":
            check_recipe(words[words.index("finetune.py") + 1 :])
        elif words[:2] == ["python", "finetune.py"]:
            assert "--lora_modules_to_save" in run([sys.executable, str(ROOT / "finetune.py"), *words[2:]], place)
        elif words[:2] == ["python", "examples/guicourse/make_data.py"]:
            run([sys.executable, str(ROOT / words[1]), *words[2:]], place)
        elif words[:2] == ["python", "tests/parity.py"]:
            check_parity(words[2], place)
        elif words[:3] == ["python", "-m", "finetune"]:
            run([sys.executable, *words[1:]], place)
        else:
            pytest.fail(f"README.md has a command that no test runs: {command}")


def check_parity(what: str, place: Path) -> None:
    """The figures that are part of the repository."""
    golden = ROOT / "tests/golden"
    folders = sorted((golden / "forward").iterdir()) if what == "forward" else [golden / "encode"]
    assert "ok" in run([sys.executable, str(ROOT / "tests/parity.py"), what, *map(str, folders)], place)


def check_recipe(words: list[str]) -> None:
    """Files of flags: tests/generations makes a step with each, here the words behind it count."""
    from finetune.arguments.parse import parse_arguments

    args = parse_arguments([str(ROOT / words[0]), *words[1:]])
    assert args.training.learning_rate == pytest.approx(float(words[words.index("--learning_rate") + 1]))


def check_edited_launchers(assignment: str, place: Path) -> None:
    """A user who replaces the line of the variable gets the value."""
    name, _, value = assignment.partition("=")
    for script in ("finetune_lora.sh", "finetune_ds.sh"):
        text = (ROOT / script).read_text()
        edited, count = re.subn(rf"^{name}=.*$", assignment, text, flags=re.MULTILINE)
        assert count >= 1, f"{script} has no line for {name}"
        copy = place / "copy"
        copy.mkdir(exist_ok=True)
        for path in ROOT.glob("ds_config_*.json"):
            shutil.copy(path, copy)
        (copy / script).write_text(edited)
        assert value.strip('"') in run(["sh", str(copy / script)], place, DRY_RUN="1")


def test_json_records_are_readable(tmp_path):
    from PIL import Image

    from finetune.readers import read

    docs = re.findall(r"```json\n(.*?)```", (ROOT / "docs/data.md").read_text(), flags=re.DOTALL)
    docs = [body for body in docs if "file_name" not in body]  # descriptions of data sets are no records
    for name in {name for body in [*blocks("json"), *docs] for name in re.findall(r"[\w/]+\.(?:jpg|png)", body)}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (640, 480)).save(tmp_path / name)
    for name in ("1.mp3", "1.mp4"):
        (tmp_path / name).touch()
    assert blocks("json")
    for body in [*blocks("json"), *docs]:
        records = json.loads(body)
        (tmp_path / "data.json").write_text(json.dumps(records if isinstance(records, list) else [records]))
        for sample in read(tmp_path / "data.json"):
            assert any(message.train for message in sample.messages)


def test_python_snippets(place):
    from PIL import Image

    assert blocks("python")
    (place / "assets").mkdir()
    Image.new("RGB", (64, 48), "red").save(place / "assets/airplane.jpeg")
    for body in blocks("python"):
        assert "AutoPeftModel" in body or "MiniCPMVChat" in body
        run([sys.executable, "-c", body], place)


def test_flags_named_in_the_readme_exist():
    from dataclasses import fields

    from finetune.arguments.data import DataArguments
    from finetune.arguments.model import LoraArguments, ModelArguments
    from finetune.arguments.training import TrainingArguments

    known = {
        entry.name
        for group in (ModelArguments, DataArguments, TrainingArguments, LoraArguments)
        for entry in fields(group)
    }
    text = README + (ROOT / "docs/data.md").read_text()
    named = set(re.findall(r"--([a-z0-9_]+)", re.sub(r"python -m finetune[^\n`]*", "", text))) - {
        "help",
        "nproc_per_node",
    }
    assert named <= known, named - known


def test_every_generation_is_in_the_table():
    from finetune.families import FAMILIES

    for family in FAMILIES:
        assert f"| {family.title} | `{family.hub_id}` |" in README
