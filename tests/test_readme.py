"""Every command, record and snippet of README.md and of docs/ is tried here; one that this file does not know fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import parity
import pytest

ROOT = Path(__file__).resolve().parent.parent
# In the order of a user who reads them: later commands use what earlier ones made.
FIRST = ("README", "docs/quick_start", "docs/training", "docs/lora", "docs/yaml", "docs/resuming", "docs/commands")
FIRST += ("docs/chat", "docs/export", "docs/evaluation", "docs/guicourse", "CONTRIBUTING")
PAGES = {name: (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in FIRST}
PAGES |= {f"docs/{path.stem}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
README = PAGES["README"]
SHORT = (
    "--max_steps",
    "1",
    "--warmup_steps",
    "0",
    "--save_strategy",
    "no",
    "--eval_strategy",
    "no",
    "--dataloader_num_workers",
    "0",
)
# Answers may be short too.
SHORT_OF = {"evaluate": ["--max_new_tokens", "4"]}
# Commands of other projects, on docs/export.md.
FOREIGN = (
    "vllm ",
    "lmms-eval ",
    "llama.cpp/",
    "ollama ",
    "pip install -e ",
    "python tools/mtmd/",
    "python convert_hf_to_gguf.py ",
)
# Files that a user has, and names that stand for one: such a command is only held to the flags that exist.
USERS_OWN = re.compile(r"\b[A-Z]{2,}\b|\.\.\.|\b(merge\.yaml|configs/|checkpoint-\d+|output/run\.yaml|path/to/)")


def blocks(language: str, *pages: str) -> list[str]:
    """The code blocks of some pages, or of all of them, each once."""
    text = "\n".join(PAGES[page] for page in pages or PAGES)
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    return list(dict.fromkeys("\n".join(line.removeprefix(i) for line in body.splitlines()) for i, body in found))


def commands() -> list[str]:
    found: list[str] = []
    for page, text in PAGES.items():
        found += [
            re.sub(r"(^| )#.*", "", line).strip() for block in blocks("shell", page) for line in block.splitlines()
        ]
        found += [" ".join(code.split()) for code in re.findall(r"`((?:sh|python|make|torchrun) [^`]+)`", text)]
    # "<command>" is the name of all of them; those of the pages are run.
    return list(dict.fromkeys(line for line in found if line and "<command>" not in line))


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
def place(tiny, demo_data, tmp_path_factory, forked_python) -> Path:
    """A user's directory after `sh finetune_lora.sh` with the default OUTPUT_DIR."""
    folder = tmp_path_factory.mktemp("user")
    env = {"MODEL": str(tiny("llama3_v2_5")), "DATA": str(demo_data / "train.json"), "PYTHON": forked_python}
    run(["sh", str(ROOT / "finetune_lora.sh"), *SHORT], folder, **env)
    return folder


@pytest.fixture
def as_user(place, monkeypatch) -> None:
    """This process in the user's directory, with nobody at the terminal."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.mark.usefixtures("as_user")
def test_commands(place, demo_data):
    assert len(commands()) > 60
    for command in commands():
        if not command.startswith(FOREIGN):
            check_command(command, place, demo_data)


def check_command(command: str, place: Path, demo_data: Path) -> None:
    words = command.split()
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets, command
    elif re.fullmatch(r'(MODEL|DATA|EVAL_DATA)="[^"]*"', command):
        check_edited_launchers(command, place)
    elif "sh" in words:
        own = dict(word.split("=") for word in words[: words.index("sh")])
        env = {"DATA": str(demo_data / "train.json"), **own}
        script, *flags = words[words.index("sh") + 1 :]
        printed = run(["sh", str(ROOT / script), *flags], place, DRY_RUN="1", **env)
        assert str(ROOT / "finetune.py") in printed
        assert all(word in printed for word in (*flags, *own.values())), command
    elif words[0] == "torchrun":
        check_launch(words[words.index("finetune.py") + 1 :])
    elif words[0] == "python":
        check_python(command, place)
    else:
        pytest.fail(f"a page has a command that no test runs: {command}")


def check_python(command: str, place: Path) -> None:
    words = command.split()
    if words[:2] == ["python", "tests/parity.py"]:
        check_parity(words[2])
    elif words[:3] == ["python", "-m", "finetune"]:
        check_finetune(command)
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), command
    elif words[:2] == ["python", "finetune.py"]:
        assert "--lora_modules_to_save" in run([sys.executable, str(ROOT / "finetune.py"), *words[2:]], place)
    elif words[:2] == ["python", "examples/guicourse/make_data.py"]:
        run([sys.executable, str(ROOT / words[1]), *words[2:]], place)
    else:  # scripts of developers have tests of their own, or record figures
        assert (ROOT / words[1]).is_file(), f"a page has a command that no test runs: {command}"


def check_finetune(command: str) -> None:
    """`python -m finetune ...` is run, unless it names files that only a user has.

    In this process, where nothing has to be imported again; that the module starts is seen in tests/commands.
    """
    from finetune.__main__ import COMMANDS, main

    words = command.split()
    if len(words) > 4 and not USERS_OWN.search(command):
        assert status_of(main, [*words[3:], *SHORT_OF.get(words[3], [])]) == 0, command
        return
    assert words[3] in COMMANDS, command
    assert named_flags(command) <= {"help"} | training_flags() | command_flags(), command


def status_of(main: Callable[[list[str]], int], argv: list[str]) -> object:
    """The exit status of a command, of one that prints its help too."""
    try:
        return main(argv)
    except SystemExit as end:
        return end.code or 0


def check_parity(what: str) -> None:
    """The figures that are part of the repository."""
    golden = ROOT / "tests/golden"
    folders = sorted((golden / "forward").iterdir()) if what == "forward" else [golden / "encode"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert parity.main([what, *map(str, folders)]) == 0, said.getvalue()
    assert "ok" in said.getvalue()


def check_launch(argv: list[str]) -> None:
    """Files of flags: tests/generations makes a step with each of ours, here the flags behind it count."""
    from finetune.arguments.parse import parse_arguments

    assert named_flags(" ".join(argv)) <= training_flags()
    if argv and argv[0].startswith("examples/"):
        args = parse_arguments([str(ROOT / argv[0]), *argv[1:]])
        assert args.training.learning_rate == pytest.approx(float(argv[argv.index("--learning_rate") + 1]))


def check_edited_launchers(assignment: str, place: Path) -> None:
    """A user who replaces the line of the variable gets the value."""
    name, _, value = assignment.partition("=")
    for script in ("finetune_lora.sh", "finetune_ds.sh"):
        text = (ROOT / script).read_text()
        edited, count = re.subn(rf"^{name}=.*$", assignment, text, flags=re.MULTILINE)
        assert count >= 1, f"{script} has no line for {name}"
        copy = place / "copy"
        copy.mkdir(exist_ok=True)
        for path in (ROOT / "finetune.py", *ROOT.glob("ds_config_*.json")):
            shutil.copy(path, copy)
        (copy / script).write_text(edited)
        assert value.strip('"') in run(["sh", str(copy / script)], place, DRY_RUN="1")


def test_json_records_are_readable(tmp_path):
    from PIL import Image

    from finetune.readers import read

    bodies = [body for body in blocks("json") if "file_name" not in body]  # descriptions of data sets are no records
    assert len(bodies) >= 5
    for name in {name for body in bodies for name in re.findall(r"[\w/]+\.(?:jpg|png)", body)}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (640, 480)).save(tmp_path / name)
    for name in ("1.mp3", "1.mp4", "user.wav", "voice.wav"):
        (tmp_path / name).touch()
    for body in bodies:
        records = json.loads(body)
        (tmp_path / "data.json").write_text(json.dumps(records if isinstance(records, list) else [records]))
        for sample in read(tmp_path / "data.json", pairs="rejected" in body):
            assert any(message.train for message in sample.messages)


def test_python_snippets(place):
    from PIL import Image

    (place / "assets").mkdir()
    Image.new("RGB", (64, 48), "red").save(place / "assets/airplane.jpeg")
    # Held by tests/test_docs.py, tests/test_run.py and tests/extras.
    held = ("Family(", "finetune.run", "generate_inner")
    bodies = [body for body in blocks("python") if not any(words in body for words in held)]
    assert len(bodies) >= 3
    for body in bodies:
        assert "AutoPeftModel" in body or "MiniCPMVChat" in body
        # They share a process: each brings what registers the models.
        assert re.search(r"^(import finetune\.models|from chat import )", body, flags=re.MULTILINE), body
    run([sys.executable, "-c", "import sys\nfor body in sys.argv[1:]:\n    exec(body, {})", *bodies], place)


def named_flags(text: str) -> set[str]:
    return set(re.findall(r"--([a-z0-9_]+)", text))


def training_flags() -> set[str]:
    from dataclasses import fields

    from finetune.arguments.data import DataArguments
    from finetune.arguments.model import LoraArguments, ModelArguments
    from finetune.arguments.training import TrainingArguments

    groups = (ModelArguments, DataArguments, TrainingArguments, LoraArguments)
    return {entry.name for group in groups for entry in fields(group)}


def command_flags() -> set[str]:
    """Those that the modules of the commands name."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "finetune/commands").glob("*.py"))
    return set(re.findall(r'"--([a-z0-9_]+)"', sources))


def without_commands(text: str) -> str:
    others = "|".join(map(re.escape, FOREIGN))
    return re.sub(rf"(python -m finetune|sbatch|{others})[^\n`]*", "", text)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/export"])
def test_flags_named_on_the_pages_exist(page):
    """On docs/export.md many are of other projects."""
    known = {"help", "nproc_per_node"} | training_flags()
    of_commands = (
        "commands",
        "training",
        "yaml",
        "evaluation",
        "guicourse",
        "chat",
        "data",
        "memory",
        "settings",
        "troubleshooting",
        "faq",
    )
    of_commands += ("index", "duplex", "lora", "llamafactory", "add_a_generation", "CONTRIBUTING", "reliability")
    if page.removeprefix("docs/") in of_commands:
        known |= command_flags()
    if page == "docs/evaluation":
        known |= {"model_args", "tasks", "output_path"}  # of lmms-eval
    assert named_flags(without_commands(PAGES[page])) <= known


def test_every_generation_is_in_the_table():
    from finetune.families import FAMILIES

    for family in FAMILIES:
        assert f"| {family.title} | `{family.hub_id}` |" in README
