"""``python -m finetune init``: what it writes is checked, trained and named right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from finetune.arguments.early_flags import early_flags
from finetune.commands import check
from finetune.commands.init import METHODS, TASKS, main
from finetune.evaluation.metrics import METRICS
from finetune.readers import read
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b b.jpg", "blue"), ("c.png", "green")):
        Image.new("RGB", (60, 40), colour).save(folder / name)
    return folder


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_flag_is_one_and_every_record_is_read(tmp_path, task, method):
    folder = tmp_path / "new"
    assert main([str(folder), "--task", task, "--method", method]) == 0
    flags = early_flags([str(folder / "train.yaml")])
    assert flags["model_name_or_path"] == ["openbmb/MiniCPM-V-2_6"]
    assert flags["max_slice_nums"] == [str(TASKS[task].max_slice_nums)]
    assert ("use_lora" in flags, "q_lora" in flags) == (method != "full", method == "qlora")
    (sample,) = read(folder / "train.json")
    assert sample.messages[-1].text == "The answer you want."
    assert TASKS[task].metric in (*METRICS, "auto")


def test_images_and_a_table_become_records(tmp_path, pictures, capsys):
    table = tmp_path / "answers.csv"
    table.write_text('\ufeffimage,answer,question\na.png,red,\n"b b.jpg","blue, sky",Which colour?\nc.png,green,\n')
    folder = tmp_path / "new"
    wanted = ["--images", str(pictures), "--answers", str(table), "--question", "Colour?", "--eval_share", "0"]
    assert main([str(folder), *wanted]) == 0
    samples = list(read(folder / "train.json"))
    assert [sample.messages[-1].text for sample in samples] == ["red", "blue, sky", "green"]
    assert [sample.messages[0].text.strip() for sample in samples] == ["Colour?", "Which colour?", "Colour?"]
    assert [sum(1 for _ in sample.media("image")) for sample in samples] == [1, 1, 1]
    assert "3 training and 0 evaluation records" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("image,answer\na.png,\n", "line 2: image and answer must not be empty"),
        ("image,answer\na.png,red\nno.png,blue\n", "line 3: no image 'no.png' in"),
        ("file,answer\na.png,red\n", "no column image; its columns are ['file', 'answer']"),
        ("", "no column answer and image"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, pictures, table, said):
    (tmp_path / "answers.csv").write_text(table)
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "new"), "--images", str(pictures), "--answers", str(tmp_path / "answers.csv")])
    assert said in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="belong together"):
        main([str(tmp_path / "new"), "--images", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_written_is_checked_and_trained(tiny, pictures, tmp_path, capsys, forked_python):
    table = tmp_path / "answers.csv"
    table.write_text("image,answer\n" + "".join(f"{name},yes\n" for name in ("a.png", "b b.jpg", "c.png")))
    folder = tmp_path / "new"
    wanted = ["--images", str(pictures), "--answers", str(table), "--task", "classification"]
    assert main([str(folder), *wanted, "--model", str(tiny("llama3_v2_5")), "--eval_share", "0.3"]) == 0
    assert len(json.loads((folder / "eval.json").read_text())) == 1
    assert check.main([str(folder / "train.yaml")]) == 0
    flags = ["--nproc", "1", str(folder / "train.yaml"), "--max_steps", "1", "--warmup_steps", "0"]
    flags += ["--dataloader_num_workers", "0"]
    done = subprocess.run(
        [forked_python, "-m", "finetune", "train", *flags],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1].removeprefix("result="))["verified"] is True


@pytest.mark.parametrize("method", METHODS)
def test_the_commands_of_its_readme_are_understood(tmp_path, pictures, method):
    """Every command is parsed, and says of the result what it is: an adapter, or a model."""
    table = tmp_path / "answers.csv"
    table.write_text("image,answer\na.png,red\nc.png,green\n")
    folder = tmp_path / "new"
    assert main([str(folder), "--method", method, "--images", str(pictures), "--answers", str(table)]) == 0
    commands = [
        line.split() for line in (folder / "README.md").read_text().splitlines() if "python -m finetune" in line
    ]
    given = {}
    for _, _, _, name, *words in commands:
        parser = importlib.import_module(f"finetune.commands.{name}").build_parser()
        given[name] = vars(parser.parse_args(words)) if name not in ("check", "train") else words
    adapter, output = method != "full", str(folder / "output")
    assert given["chat"]["adapter" if adapter else "model"] in (output, [output])
    assert given["evaluate"]["compare"] == ("base" if adapter else "openbmb/MiniCPM-V-2_6")
    assert ("export" in given) == adapter


def test_a_model_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--model v2_7: no generation, .* did you mean v[24]_\d\?"):
        main([str(tmp_path / "new"), "--model", "v2_7"])
