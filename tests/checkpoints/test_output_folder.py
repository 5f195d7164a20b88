"""The output folder: no file that is not known to be ours is removed, and nothing changes before all checks."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.checkpoints.output_folder import Input, LogsCallback, OutputFolder
from finetune.model_folders.output_contents import STATE_FOLDER, OutputError
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
SIDE = ["tokenizer.json", "config.json"]
Files = dict[str, str]


def write(folder: Path, *names: str, text: str = "mine") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> Files:
    """Text by path; without the records of runs."""
    found = (path for path in folder.rglob("*") if path.is_file() and STATE_FOLDER not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(found)}


def run(folder: Path, *names: str, text: str = "ours", use_lora: bool = True, ends: bool = True, **how: bool) -> None:
    """A run that writes some files and, unless it is killed, comes to its end."""
    with OutputFolder(folder) as output:
        how = {"resuming": False, "overwrite": False, **how}
        output.check([], SIDE[:1] if use_lora else SIDE, use_lora=use_lora, **how)
        output.lock()
        output.open()
        logs = LogsCallback(output)
        write(folder, *names, text=text)
        logs.on_train_begin(TrainingArguments(str(folder)), TrainerState(), TrainerControl())
        output.add(*(name.partition("/")[0] for name in names if name.startswith("checkpoint-")))
        if ends:
            output.finish()


LORA = ("run.yaml", "adapter_config.json", "adapter_model.safetensors", "README.md", "checkpoint-5/a", "runs/Nov29/e")


def test_a_former_result_stays_until_the_new_one_is_complete(tmp_path):
    folder = tmp_path / "out"
    run(folder, *LORA, text="old")
    write(folder, "notes.txt", "runs/pictures/a.png", "checkpoint-notes/a", "model.safetensors")
    mine = {name: text for name, text in contents(folder).items() if text == "mine"}
    assert len(mine) == 4
    run(folder, "run.yaml", text="new", ends=False, overwrite=True)
    kept = contents(folder)
    assert {name.removeprefix(".former-1/") for name, text in kept.items() if text == "old"} == set(LORA)
    assert {name: text for name, text in kept.items() if text == "mine"} == mine
    # A second attempt that fails does not lose the only result there is.
    run(folder, "run.yaml", text="newer", ends=False, overwrite=True)
    assert sum(text == "old" for text in contents(folder).values()) == len(LORA)
    run(folder, *LORA[:3], text="newest", overwrite=True)
    assert contents(folder) == mine | dict.fromkeys(LORA[:3], "newest")
    assert not list(folder.glob(".former-*"))


def test_what_the_user_has_put_into_a_former_result_stays(tmp_path):
    """Also what was put into the place where it is kept in the meantime."""
    folder = tmp_path / "out"
    run(folder, *LORA, text="old")
    run(folder, ends=False, overwrite=True)
    write(folder / ".former-1", "mine.txt")
    run(folder, *LORA, overwrite=True)
    assert contents(folder)[".former-1/mine.txt"] == "mine"


@pytest.mark.parametrize("how", ["resuming", "overwrite"])
@pytest.mark.parametrize(
    ("use_lora", "name"),
    [(True, "README.md"), (True, "adapter_config.json"), (True, "tokenizer.json"), (True, "checkpoint-7/mine"),
     (False, "config.json"), (False, "model-00001-of-00002.safetensors"), (False, "README.md")],
)  # fmt: skip
def test_foreign_files_are_not_replaced(tmp_path, how, use_lora, name):
    write(tmp_path, name)
    with pytest.raises(OutputError, match=rf"would replace them: {name.partition('/')[0]}\. Choose"):
        run(tmp_path, use_lora=use_lora, overwrite=how == "overwrite", resuming=how == "resuming")
    assert contents(tmp_path) == {name: "mine"}
    assert not (tmp_path / STATE_FOLDER).exists()


def test_foreign_files_beside_stay(tmp_path):
    write(tmp_path, "config.json", "runs/cat.png", "checkpoint-best/a")
    run(tmp_path, *LORA, overwrite=True)
    run(tmp_path, *LORA, overwrite=True)
    assert {name for name, text in contents(tmp_path).items() if text == "mine"} == {
        "config.json", "runs/cat.png", "checkpoint-best/a",
    }  # fmt: skip


def test_a_run_goes_on_in_its_own_folder(tmp_path):
    run(tmp_path, "run.yaml", "checkpoint-5/a", ends=False)
    run(tmp_path, *LORA, resuming=True)
    assert set(contents(tmp_path)) == set(LORA)
    with pytest.raises(OutputError, match="not empty: choose another, continue its run with"):
        run(tmp_path)


def test_a_folder_of_an_earlier_version_can_be_gone_on_with_but_not_replaced(tmp_path):
    """It kept no list."""
    write(tmp_path, "run.yaml", text="flags:\n  a: 1\nbase:\n  name: x\nversions:\n  torch: '2'\n")
    write(tmp_path, *LORA[1:])
    with pytest.raises(OutputError, match="README"):
        run(tmp_path, overwrite=True)
    run(tmp_path, *LORA, resuming=True)


def test_a_run_that_saved_nothing_leaves_no_trace_in_the_way(tmp_path):
    run(tmp_path, "run.yaml", "runs/Nov29/e", ends=False)
    run(tmp_path, *LORA)
    assert contents(tmp_path) == dict.fromkeys(LORA, "ours")


def test_nothing_is_made_for_a_run_that_does_not_begin(tmp_path):
    folder = tmp_path / "a" / "out"
    with OutputFolder(folder) as output:
        output.check([], SIDE, use_lora=True, resuming=False, overwrite=False)
        output.lock()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("out", "given", "how"),
    [
        ("m", "m", "is"),
        ("m/out", "m", "lies in"),
        (".", "m", "holds"),
        ("m/..", "m", "holds"),
        ("link", "m", "is"),
        (".", "data.json", "holds"),
    ],
)
def test_an_output_folder_is_not_an_input(tmp_path, out, given, how):
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to("m")
    write(tmp_path, "data.json")
    output = OutputFolder(tmp_path / out)
    with pytest.raises(OutputError, match=rf" {how} .*{given}, which is read \(--model\)"):
        output.check([Input("--model", tmp_path / given)], [], use_lora=True, resuming=False, overwrite=True)
    OutputFolder(tmp_path / "beside").check(
        [Input("--model", tmp_path / given)], [], use_lora=True, resuming=False, overwrite=True
    )


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    write(tmp_path, "file")
    with pytest.raises(OutputError, match=r"file/out cannot be used: Not a directory \(.*file"):
        run(tmp_path / "file" / "out")


def test_a_list_from_elsewhere_reaches_nothing_outside(tmp_path):
    folder = tmp_path / "out"
    write(tmp_path, "precious")
    write(
        folder, f"{STATE_FOLDER}/files.json", text=json.dumps({"files": ["../precious", str(tmp_path / "precious"), 5]})
    )
    run(folder, *LORA, overwrite=True)
    run(folder, *LORA, overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.fixture
def train() -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location("launched", ROOT / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fixed = ("--use_lora", "true", "--use_cpu", "true", "--report_to", "none", "--overwrite_output_dir", "true")
    return lambda *flags: module.main([*fixed, *map(str, flags)])


CASES = {
    "OUT is the model": lambda base, out: (base, None, "is .*which is read"),
    "OUT holds the adapter": lambda base, out: (base, ("--lora_weight_path", out), "is .*which is read"),
    "OUT holds the model": lambda base, out: (out / "checkpoint-5", None, "holds .*which is read"),
    "no data": lambda base, out: (base, ("--data_path", "none.json"), "none.json"),
    "bad data": lambda base, out: (base, ("--data_path", "bad.json"), "match no format"),
    "no model": lambda base, out: ("no/model", None, "no/model"),
    "cut weights": lambda base, out: ("cut", None, "truncated"),
    "no adapter": lambda base, out: (base, ("--lora_weight_path", "nothing"), "nothing"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_cannot_begin_removes_nothing(case, tiny, demo_data, tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    shutil.copytree(tiny("llama3_v2_5"), base)
    shutil.copytree(base, "cut")
    weights = Path("cut", "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    Path("bad.json").write_text('[{"id": 1}]')
    out = tmp_path / "out"
    run(out, *LORA)
    shutil.copyfile(base / "config.json", out / "checkpoint-5" / "config.json")
    model, flags, message = CASES[case](base, out)
    if case == "OUT is the model":
        out = base
    before = {path: path.stat().st_mtime_ns for path in [*out.rglob("*")] if path.is_file()}
    data = () if flags and "--data_path" in flags else ("--data_path", demo_data / "train.json")
    with pytest.raises(UserError, match=message):
        train("--model_name_or_path", model, "--output_dir", out, *data, *(flags or ()))
    assert {path: path.stat().st_mtime_ns for path in [*out.rglob("*")] if path.is_file()} == before
