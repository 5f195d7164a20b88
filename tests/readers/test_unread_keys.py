"""Keys that are not read: told with their number, refused where they hold media; the tables of keys are the truth."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.readers import read, record_keys
from finetune.readers.forms import OWN_NAMES, ROLE_CONTENT, Form, named_columns
from finetune.readers.record_media import media_folders
from finetune.readers.record_reader import RecordReader
from finetune.sample import DataError, Sample, Source

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]
FORMS: dict[str, dict[str, Any]] = {
    "official": {"conversations": CHAT},
    "sharegpt": {"messages": CHAT},
    "openai": {"messages": PARTS},
    "alpaca": {"instruction": "Hi", "output": "Ho"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    for name in ("a.png", "b.png", "seven"):
        Image.new("RGB", (8, 8)).save(data / name, "PNG")
    for name in ("clip.mp4", "sound.mp3"):
        (data / name).write_bytes(b"")
    return data


def one(folder: Path, record: Any, form: Any) -> Sample:
    (folder / "data.json").write_text(json.dumps([record]))
    return read(folder / "data.json", data_format=form)[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_nothing_reads_is_a_note(folder: Path, form: str) -> None:
    extra = {"width": 3, "notes": {"by": ["Ann"]}, "audo": "x", "empty": [], "none": None}
    sample = one(folder, {**FORMS[form], "id": 1, **extra}, form)
    known = "audio" if form == "official" else "audios"
    assert sample.notes == (
        f"keys that are not read: 'audo' (did you mean '{known}'?)",
        "keys that are not read: 'notes'",
        "keys that are not read: 'width'",
    )
    assert one(folder, FORMS[form], form).notes == ()


@pytest.mark.parametrize("form", ["official", "sharegpt", "openai"])
def test_keys_of_turns_and_of_parts(folder: Path, form: str) -> None:
    record = FORMS[form]
    (key,) = record
    question, answer = record[key]
    if form == "openai":
        question = {"role": "user", "content": [{**question["content"][0], "cache_control": 1}]}
    sample = one(folder, {key: [question, {**answer, "los": 0, "score": 0.5}]}, form)
    of_parts = ("keys of parts of content lists that are not read: 'cache_control'",) if form == "openai" else ()
    assert sample.notes == (
        *of_parts,
        "keys of turns that are not read: 'los' (did you mean 'loss'?)",
        "keys of turns that are not read: 'score'",
    )


def data_of(folder: Path, kind: str) -> str:
    return f"{kind}{base64.b64encode((folder / 'a.png').read_bytes() + bytes(200)).decode()}"


MEDIA: list[tuple[str, Any, str]] = [
    ("image_path", "a.png", "image"),
    ("img", "./a.png", "image"),
    ("Image", "{folder}/a.png", "image"),
    ("file", "file://{folder}/a.png", "image"),
    ("image_list", ["a.png", "b.png"], "image"),
    ("metadata", {"source": [{"file": "b.png"}]}, "image"),
    ("picture_id", "seven", "image"),
    ("movie", "clip.mp4", "video"),
    ("speech", "sound.mp3", "audio"),
    ("image_file", "gone.png", "image"),
    ("photo", "https://x.org/a.jpg", "image"),
    ("encoded", "data:image/png;base64,", "image"),
    ("encoded", "", "image"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("key", "value", "kind"), MEDIA)
def test_media_under_a_key_that_nothing_reads(folder: Path, form: str, key: str, value: Any, kind: str) -> None:
    value = (
        data_of(folder, value) if key == "encoded" else json.loads(json.dumps(value).replace("{folder}", str(folder)))
    )
    name = kind if form == "official" else f"{kind}s"
    with pytest.raises(DataError, match=rf"record 0: the key '{key}' is not read, but contains .*; call it '{name}'"):
        one(folder, {**FORMS[form], key: value}, form)


@pytest.mark.parametrize("form", ["official", "sharegpt", "openai"])
def test_media_under_an_unread_key_of_a_turn(folder: Path, form: str) -> None:
    key = "conversations" if form == "official" else "messages"
    with pytest.raises(
        DataError, match=r"turn 0: the key 'img' is not read, but contains 'a.png'; give the file in th"
    ):
        one(folder, {key: [{**CHAT[0], "img": "a.png"}, CHAT[1]]}, form)


def test_media_beside_the_text_of_a_part(folder: Path) -> None:
    part = {"type": "text", "text": "Hi", "image": "a.png"}
    with pytest.raises(DataError, match=r"turn 0: the key 'image' is not read, but contains 'a.png'"):
        one(folder, {"messages": [{"role": "user", "content": [part]}, CHAT[1]]}, "openai")
    part = {"type": "image", "image": "a.png", "image_url": {"url": "b.png"}}
    with pytest.raises(DataError, match=r"'image' is \"a.png\" and 'image_url' is .*, which are synonyms; keep one"):
        one(folder, {"messages": [{"role": "user", "content": [part]}, CHAT[1]]}, "openai")


def test_bytes_and_pictures_of_tables(folder: Path) -> None:
    reading = RecordReader(Form("official"), media_folders(folder), "all")
    data = (folder / "a.png").read_bytes()
    for value in (data, {"bytes": data, "path": None}, [data], Image.new("RGB", (2, 2))):
        with pytest.raises(
            DataError, match="the key 'shot' is not read, but contains an image inside it; call it 'image'"
        ):
            reading.sample({"conversations": CHAT, "shot": value}, Source("t", 0))
    assert reading.sample({"conversations": CHAT, "hash": b"abc"}, Source("t", 0)).notes


@pytest.mark.parametrize(
    "extra",
    [
        {"file_name": "a.png"},  # the file that is read
        {"image_path": "/elsewhere/a.png"},
        {"image_url": "https://x.org/0123.jpg"},  # where it came from
        {"image_id": 7},
        {"page": "notes.txt"},
        {"title": "b.png\nand more"},
    ],
)
def test_what_is_no_medium_that_was_forgotten(folder: Path, extra: dict[str, Any]) -> None:
    sample = one(folder, {"image": "a.png", "conversations": CHAT, **extra}, "official")
    assert sample.notes == (f"keys that are not read: '{next(iter(extra))}'",)


def test_a_described_column_may_be_left_out(folder: Path) -> None:
    """Where columns are named, the others do not exist: the remedy is to name one."""
    form = Form("sharegpt", named_columns({"messages": "messages"}), ROLE_CONTENT)
    with pytest.raises(
        DataError, match=r"'pictures' is not read, but contains 'a.png'; name it under columns, 'images': 'pictures'"
    ):
        RecordReader(form, media_folders(folder), "all").sample(
            {"messages": CHAT, "pictures": ["a.png"]}, Source("t", 0)
        )


class Spy(dict):
    """An object that notes which of its keys are asked for."""

    def __init__(self, *given: Any, **entries: Any) -> None:
        super().__init__(*given, **entries)
        self.asked: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def spied(record: dict[str, Any]) -> tuple[Spy, list[Spy], list[Spy]]:
    """The record, its turns and the parts of their contents as spies."""
    turns, parts = [], []
    for key in ("conversations", "messages"):
        for turn in record.get(key, ()):
            if isinstance(turn["content"], list):
                parts += (made := [Spy(part) for part in turn["content"]])
                turn = {**turn, "content": made}
            turns.append(Spy(turn))
        if key in record:
            record = {**record, key: turns}
    return Spy(record), turns, parts


@pytest.mark.parametrize("name", FORMS)
def test_the_tables_name_what_is_read(folder: Path, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What readers ask a record for, with nothing in it for the check of unread keys, is what the tables say."""
    monkeypatch.setattr("finetune.readers.record_reader.unread_notes", lambda *_: ())
    form = Form(name, replace(OWN_NAMES, messages=None if name == "alpaca" else "messages"), ROLE_CONTENT)
    reading = RecordReader(form, media_folders(folder), "all")
    asked: set[str] = set()
    of_turns: set[str] = set()
    for record in every_way(name):
        top, turns, parts = spied(record)
        reading.sample(top, Source("t", 0))
        asked |= top.asked
        of_turns = of_turns.union(*(turn.asked for turn in turns))
        for part in parts:
            assert part.asked <= record_keys.part_keys(part["type"].removesuffix("_url"))
    elsewhere = {record_keys.IDENTITY, record_keys.ANSWERS} & record_keys.record_keys(form)  # by Source and by evaluate
    others = {*record_keys.COMPARED, *(() if name == "duplex" else (record_keys.DUPLEX,))}
    assert asked - others | elsewhere == record_keys.record_keys(form)
    if name != "alpaca":
        assert of_turns == record_keys.turn_keys(form)


def every_way(name: str) -> Iterator[dict[str, Any]]:
    yield FORMS[name]
    if name == "official":
        yield {"messages": CHAT}
        yield {
            "messages": [{"from": "human", "value": "a", "content": ""}, {"from": "gpt", "value": "b", "content": ""}]
        }
    if name != "alpaca":
        key = "conversations" if name == "official" else "messages"
        yield {key: [{**CHAT[0], "image": "a.png"}, CHAT[1]]}
    if name == "openai":
        medium = {"type": "image_url", "image_url": {"url": "a.png"}}
        yield {"messages": [{"role": "user", "content": [medium]}, CHAT[1]]}


def test_the_table_of_the_documentation_names_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = text.split("### Keys")[1].split("### Tools")[0]
    named = {
        record_keys.IDENTITY,
        record_keys.DUPLEX,
        record_keys.ANSWERS,
        record_keys.RESULT_OF,
        *record_keys.SYSTEM,
        *record_keys.TOOLS,
        *record_keys.LOSS,
        *record_keys.THOUGHT,
    }
    named |= {*record_keys.CALLS, *record_keys.MEDIA_OF_TURNS}
    cells = "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert named == set(re.findall(r"`(\w+)`", cells)) - {"rejected"}


def test_a_misspelled_key_is_named_where_its_absence_is_the_error(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "0", "imgae": "0.jpg", "conversations": turns}]))
    with pytest.raises(DataError, match=r"the key 'imgae' is not read: did you mean 'image'\?"):
        read(tmp_path / "data.json")[0]
