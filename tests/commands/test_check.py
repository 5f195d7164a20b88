"""The command that looks at data: the flags of training, and the status that training would end with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.commands.check import main
from finetune.data_files.python_literals import write_json
from finetune.runtime import outcome
from finetune.sample import DataError
from finetune.utils.errors import ArgumentError

Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., str]:
    """Writes a data file of records with an image each; a number is the index of one without its file."""
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")

    def write(count: int, *broken: int, name: str = "data.json", **changes: Any) -> str:
        turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
        images = ["gone.png" if number in broken else "a.png" for number in range(count)]
        records = [{"image": image, "conversations": turns, **changes} for image in images]
        (tmp_path / name).write_text(json.dumps(records))
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("broken", "flags", "status", "said"),
    [
        ((), [], outcome.OK, ""),
        ((1,), [], outcome.USER_ERROR, "1 record cannot be used"),
        ((1,), ["--on_bad_sample", "skip"], outcome.OK, ""),
        ((1, 2, 3), ["--on_bad_sample", "skip"], outcome.UNUSABLE_RESULT, "more than --max_bad_share 0.1"),
        ((1, 2, 3), ["--on_bad_sample", "skip", "--max_bad_share", "0.5"], outcome.OK, ""),
        ((), ["--model_max_length", "10"], outcome.USER_ERROR, "none of 20 records can be used"),
        ((), ["--model_max_length", "10", "--overlong", "error"], outcome.USER_ERROR, "20 records cannot be used"),
        ((), ["--eval_data_path", "EVAL"], outcome.USER_ERROR, "1 record cannot be used"),
    ],
)
def test_the_status_of_training(
    tiny: Tiny, data: Callable[..., str], capsys: pytest.CaptureFixture[str], broken, flags, status, said
) -> None:
    evaluation = data(2, 0, name="eval.json")
    words = [evaluation if word == "EVAL" else word for word in flags]
    assert main(["--model", str(tiny("llama3_v2_5")), "--data", data(20, *broken), *words]) == status
    printed = capsys.readouterr()
    assert said in printed.err
    assert ("error: " in printed.err) == (status != outcome.OK)
    assert "check of" in printed.out


def test_a_file_of_flags(
    tiny: Tiny, data: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags of training that are not about data are accepted; those on the command line are named."""
    run = tmp_path / "run.yaml"
    run.write_text(f"model_name_or_path: {tiny('llama3_v2_5')}\ndata_path: {data(3)}\nlearning_rate: 1.0e-4\n")
    assert main([str(run)]) == 0
    printed = capsys.readouterr()
    assert "3 kept" in printed.out
    assert "of no effect" not in printed.err
    assert main([str(run), "--model_max_length", "10", "--lora_r", "8", "--num_train_epochs=3"]) == 2
    assert "ignored, not about data: --lora_r --num_train_epochs\n" in capsys.readouterr().err
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(f"model_name_or_path: {tiny('llama3_v2_5')}\nstage: sft\ncutoff_len: 10\nfinetuning_type: lora\n")
    assert main([str(theirs), "--data", data(3)]) == 2
    assert "the limit is 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "m"], "give data"),
        (["--model", "m", "--data", "d", "--dataset", "e"], "give data"),
        (["--data", "d"], "--model is missing"),
        (["--model", "m", "--data", "d", "--lora_rr", "8"], r"unknown: --lora_rr \(did you mean --lora_r\?\)"),
        (["gone.yaml", "--model", "m", "--data", "d"], "gone.yaml"),
        (["--model", "m", "--data", "d", "--train_on", "none"], "invalid choice"),
    ],
)
def test_wrong_arguments(words: list[str], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        main(words)


def test_each_file_is_looked_at(tiny: Tiny, data: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    files = [data(3, name="a.json"), data(3, 1, name="b.json", id="x")]
    assert main(["--model", str(tiny("llama3_v2_5")), "--data", *files, "--check", "sample"]) == 2
    printed = capsys.readouterr().out
    assert [printed.count(f"check of {file}") for file in files] == [1, 1]
    assert "record 1 (id 'x'): image 'gone.png' does not exist" in printed
    assert "warning: 1 records have the same text and media" in printed


def test_samples_are_shown_as_the_model_gets_them(
    tiny: Tiny, data: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "Say \x1b[2J!"}, {"role": "assistant", "content": "A <b>dog</b>."}]
    file = data(3, 1, name="b.json", conversations=turns)
    assert main(["--model", str(tiny("llama3_v2_5")), "--data", file, "--show", "2"]) == 2
    shown = capsys.readouterr().out.split("--- ")[1:]
    assert len(shown) == 2
    assert shown[0].startswith(f"{file}, record 0: ")
    assert "[image 60x60: 1 slice, " in shown[0]
    assert "[[A <b>dog</b>.<|eot_id|>]]" in shown[0]
    assert "Say \\x1b[2J!" in shown[0]
    assert "'gone.png' does not exist" in shown[1]


PUBLISHED = """[
    {
      "id": "0",
      "image": 'a.png',
      "conversations": [
            {'role': 'user', 'content': '<image>\\nHow many \\'desserts\\'?'},   # a comment
            {'role': 'assistant', 'content': "Three.", "loss": true},
        ]
    },
]
"""


def test_the_form_that_guides_print_becomes_json(
    tiny: Tiny, data: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data(1)
    source, target = tmp_path / "guide.json", tmp_path / "out.json"
    source.write_text(PUBLISHED)
    base = str(tiny("llama3_v2_5"))
    assert main(["--model", base, "--data", str(source)]) == 2
    command = f"python -m finetune check --data {source} --write_json OUT.json"
    assert command in capsys.readouterr().err
    assert main(["--data", str(source), "--write_json", str(target)]) == 0
    assert json.loads(target.read_text())[0]["conversations"][0]["content"] == "<image>\nHow many 'desserts'?"
    assert main(["--model", base, "--data", str(target)]) == 0
    with pytest.raises(DataError, match="exists"):
        main(["--data", str(source), "--write_json", str(target)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{'a': 1, 'a': 2}]", "duplicate key 'a'"),
        ("[open('x')]", "neither JSON nor a Python list"),
        ("[{'a': 1}", "line 1: neither JSON nor a Python list"),
        ("{'a': 1}", "put \\[ \\] around it"),
        ("[" * 5000, "neither JSON nor a Python list"),
    ],
)
def test_what_is_no_list_of_values(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=said):
        write_json(tmp_path / "a.json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_pairs_are_counted_and_both_answers_shown(
    tiny: Tiny, data: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, worse = tmp_path / "page.html", "A cat, and three dogs that are behind it."
    words = ["--model", str(tiny("llama3_v2_5")), "--data", data(3, rejected_response=worse), "--stage", "dpo"]
    assert main([*words, "--show", "1", "--html", str(page)]) == outcome.OK
    said = capsys.readouterr().out
    assert "3 kept" in said
    assert "3 pairs of answers; 3 of 3 records have an image" in said
    assert "[[A dog.<|eot_id|>]]" in said
    assert f"[[{worse}<|eot_id|>]]" in said
    assert page.read_text().count(worse) >= 1
    longest = int(re.findall(r"longest (\d+) tokens", said)[0])
    assert main([*words, "--model_max_length", str(longest - 1), "--overlong", "error"]) == outcome.USER_ERROR
    assert f"{longest} tokens" in capsys.readouterr().err
    assert main([*words, "--model_max_length", str(longest), "--overlong", "error"]) == outcome.OK
    assert main(["--model", str(tiny("llama3_v2_5")), "--data", data(3), "--stage", "dpo"]) == outcome.USER_ERROR
    assert "has no rejected answer, and --stage dpo trains on pairs" in capsys.readouterr().err
