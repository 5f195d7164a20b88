"""Preference pairs in the spellings of LLaMA-Factory, ms-swift, TRL and RLAIF-V, and what is no pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.readers import read
from finetune.readers.answer_pairs import SAME
from finetune.readers.mixture import read_named
from finetune.sample import DataError, Media, Sample

ASKED = "What is it?"
TURNS = [{"role": "user", "content": f"<image>{ASKED}"}]
GPT = [{"from": "human", "value": f"<image>{ASKED}"}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def turn(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


PLAIN = [{"role": "user", "content": ASKED}]
FORMS: dict[str, dict[str, Any]] = {
    "LLaMA-Factory, sharegpt": {"conversations": GPT, "chosen": turn("A cat."), "rejected": turn("A dog.")},
    "LLaMA-Factory, alpaca": {"instruction": f"<image>{ASKED}", "chosen": "A cat.", "rejected": "A dog."},
    "ms-swift, response": {"messages": [*TURNS, answer("A cat.")], "rejected_response": "A dog."},
    "ms-swift, messages": {
        "messages": [*TURNS, answer("A cat.")],
        "rejected_messages": [*TURNS, answer("A dog.")],
    },
    "TRL, strings": {"prompt": ASKED, "chosen": "A cat.", "rejected": "A dog."},
    "TRL, conversations": {"prompt": PLAIN, "chosen": [answer("A cat.")], "rejected": [answer("A dog.")]},
    "TRL, parts": {"prompt": PARTS, "chosen": [answer("A cat.")], "rejected": [answer("A dog.")]},
    "TRL, prompt in both": {"chosen": [*PLAIN, answer("A cat.")], "rejected": [*PLAIN, answer("A dog.")]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def pair(folder: Path, record: dict[str, Any], **options: Any) -> Sample:
    (folder / "pairs.json").write_text(json.dumps([record]))
    return read(folder / "pairs.json", pairs=True, **options)[0]


def check(sample: Sample) -> None:
    assert [message.role for message in sample.messages] == ["user", "assistant"]
    assert [message.train for message in sample.messages] == [False, True]
    assert sample.messages[0].text.strip() == ASKED
    assert [isinstance(part, Media) for part in sample.messages[0].parts].index(True) == 0
    assert sample.messages[1].text == "A cat."
    assert sample.rejected is not None
    assert (sample.rejected.text, sample.rejected.train) == ("A dog.", True)
    assert sample.with_rejected_answer is not None
    assert sample.with_rejected_answer.messages == (sample.messages[0], sample.rejected)


@pytest.mark.parametrize("form", FORMS)
def test_forms(folder, form):
    check(pair(folder, {**FORMS[form], "images": ["a.png"]}))


def test_the_columns_of_rlaif_v(folder):
    """Its images are bytes inside the table; what it says about them is not read."""
    table = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    record: dict[str, Any] = {
        "question": ASKED,
        "chosen": "A cat.",
        "rejected": "A dog.",
        "ds_name": "x",
        "image_path": "far/a.jpg",
    }
    record["image"] = {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}
    parquet.write_table(table.Table.from_pylist([record]), folder / "pairs.parquet")
    check(read(folder / "pairs.parquet", pairs=True)[0])


@pytest.mark.parametrize(
    ("form", "entry"),
    [
        (
            "LLaMA-Factory, sharegpt",
            {
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "chosen": "good", "rejected": "bad", "images": "images"},
            },
        ),
        (
            "LLaMA-Factory, alpaca",
            {"columns": {"prompt": "talk", "chosen": "good", "rejected": "bad", "images": "images"}},
        ),
        (
            "LLaMA-Factory, sharegpt",
            {
                "formatting": "sharegpt",
                "columns": {
                    "messages": "conversations",
                    "chosen": "chosen",
                    "rejected": "rejected",
                    "images": "images",
                },
            },
        ),
    ],
)
def test_dataset_info(folder, form, entry):
    own = {"conversations": "talk", "instruction": "talk", "chosen": "good", "rejected": "bad"}
    names = own if "talk" in entry["columns"].values() else {}
    record = {names.get(key, key): value for key, value in FORMS[form].items()} | {"images": ["a.png"]}
    (folder / "x.json").write_text(json.dumps([record]))
    (folder / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json", "ranking": True, **entry}}))
    check(read_named("x", folder, pairs=True)[0])
    with pytest.raises(DataError, match="is preference data .ranking., which --stage dpo trains on"):
        read_named("x", folder)


def test_only_the_last_answers_are_trained(folder):
    first = [{"role": "user", "content": "Hi"}, answer("Hello.")]
    sample = pair(folder, {"messages": [*first, *PLAIN, answer("A cat.")], "rejected_response": "A dog."})
    assert [message.train for message in sample.messages] == [False, False, False, True]


def test_equal_answers_are_noted_and_answers_that_look_like_json_stay_text(folder):
    assert SAME in pair(folder, {"prompt": ASKED, "chosen": "A cat.", "rejected": "A cat."}).notes
    sample = pair(folder, {"prompt": ASKED, "chosen": "[1, 2]", "rejected": '{"a": 1}'})
    assert sample.rejected is not None
    assert (sample.messages[-1].text, sample.rejected.text) == ("[1, 2]", '{"a": 1}')


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": ASKED, "rejected": "A dog."}, "has 'rejected' but no 'chosen'; give both answers"),
        ({"prompt": ASKED, "chosen": "A cat.", "rejected": ["A dog."]}, "'chosen' is .* and 'rejected' is"),
        ({"messages": PLAIN, "rejected": "A", "chosen": "B", "rejected_response": "A"}, "two names for the rejected"),
        ({"messages": PLAIN, "chosen": "B", "rejected_response": "A"}, "the chosen answer of 'rejected_response'"),
        ({"messages": [*PLAIN, answer("A")], "rejected_response": ["B"]}, "'rejected_response' is .* must be a string"),
        ({"rejected_response": "A"}, "has no list of turns"),
        ({"messages": [*PLAIN, answer("A")], "rejected_images": ["a.png"]}, "'rejected_images', which is not read"),
        ({"messages": [*PLAIN, answer("A")], "kto_tag": False}, "'kto_tag', which is not read"),
        ({"prompt": ASKED, "chosen": {"content": "A"}, "rejected": 3}, "'rejected' is .* must be an answer"),
        (
            {"chosen": [*PLAIN, answer("A")], "rejected": [{"role": "user", "content": "Who?"}, answer("B")]},
            "turn 0 differs between both answers",
        ),
        (
            {"chosen": [*PLAIN, answer("A")], "rejected": [*PLAIN, answer("B"), *PLAIN, answer("C")]},
            "a conversation of 2 turns, the rejected one of 4",
        ),
        ({"messages": [*PLAIN, {**answer("A"), "loss": 0}], "rejected_response": "B"}, "has loss 0"),
    ],
)
def test_what_is_no_pair(folder, record, message):
    good = {"prompt": ASKED, "chosen": "A cat.", "rejected": "A dog."}
    (folder / "pairs.json").write_text(json.dumps([good, record]))
    with pytest.raises(DataError, match=rf"record 1: .*{message}"):
        read(folder / "pairs.json", pairs=True)[1]


def test_conversations_are_refused_by_record(folder):
    plain = {"messages": [*PLAIN, answer("A cat.")]}
    (folder / "mixed.json").write_text(json.dumps([{**plain, "rejected_response": "A dog."}, plain]))
    with pytest.raises(DataError, match="record 1: has no rejected answer, and --stage dpo trains on pairs"):
        read(folder / "mixed.json", pairs=True)[1]
    with pytest.raises(DataError, match="none of the inspected records is a pair: the first has no rejected answer"):
        pair(folder, plain)
