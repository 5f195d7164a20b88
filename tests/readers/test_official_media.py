"""Videos and sound in the official form: as images, under keys and tags of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Audio, Dataset, List

from finetune.readers import read
from finetune.sample import DataError, Media, Sample, Text

ANSWER = {"role": "assistant", "content": "A dog."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that only their names tell apart: readers open none of them."""
    for name in ("a.png", "a.wav", "b.wav", "a.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def one(folder: Path, question: str, **files: Any) -> Sample:
    record = {"id": "0", **files, "conversations": [{"role": "user", "content": question}, ANSWER]}
    (folder / "data.json").write_text(json.dumps([record]))
    return read(folder / "data.json")[0]


def shown(sample: Sample) -> str:
    parts = (part.text if isinstance(part, Text) else f"[{part.kind} {part.data}]" for part in sample.messages[0].parts)
    return "".join(parts).replace(f"{sample.source.file.removesuffix('data.json')}", "")


@pytest.mark.parametrize(
    ("question", "files", "wanted"),
    [
        ("<audio>What?", {"audio": "a.wav"}, "[audio a.wav]What?"),
        ("What?", {"audio": "a.wav"}, "[audio a.wav]\nWhat?"),
        ("What?", {"audio": {"<audio>": "a.wav"}}, "[audio a.wav]\nWhat?"),
        ("<audio> or <audio>?", {"audio": ["b.wav", "a.wav"]}, "[audio b.wav] or [audio a.wav]?"),
        (
            "<audio_01><audio_00>",
            {"audio": {"<audio_00>": "a.wav", "<audio_01>": "b.wav"}},
            "[audio b.wav][audio a.wav]",
        ),
        (
            "<audio_00> of <image>, <video>?",
            {"image": "a.png", "video": "a.mp4", "audio": {"<audio_00>": "a.wav"}},
            "[audio a.wav] of [image a.png], [video a.mp4]?",
        ),
        ("What?", {"audio": "a.wav", "image": "a.png"}, "[image a.png]\n[audio a.wav]\nWhat?"),
        ("<audio>What?", {"audio": "a.wav", "image": "a.png"}, "[image a.png]\n[audio a.wav]What?"),
        ("A <sound>?", {"audio": None}, "A <sound>?"),
    ],
)
def test_places(folder: Path, question: str, files: dict[str, Any], wanted: str) -> None:
    assert shown(one(folder, question, **files)) == wanted


@pytest.mark.parametrize(
    ("question", "files", "message"),
    [
        ("<audio>What?", {}, "1 <audio> in the user turns, 0 audio files under 'audio'"),
        ("<audio>What?", {"audio": ["a.wav", "b.wav"]}, "1 <audio> in the user turns, 2 audio files under 'audio'"),
        ("<audio_00>What?", {"audio": "a.wav"}, "'audio' names no tags; write <audio>"),
        ("<image_00>", {"audio": {"<image_00>": "a.wav"}}, "'audio' has the key '<image_00>'; .* like <audio_00>"),
        ("<audio_00>", {"audio": {"<audio_01>": "a.wav"}}, "tags and audio files disagree: <audio_00> in the text"),
        ("What?", {"audio": 3}, "an audio path is a number"),
        ("What?", {"audio": "gone.wav"}, "audio 'gone.wav' does not exist"),
        ("What?", {"audio": "https://a.org/a.wav"}, "media are not downloaded"),
    ],
)
def test_bad_records(folder: Path, question: str, files: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"data.json, record 0 .*{message}"):
        one(folder, question, **files)


def test_bytes_of_a_table(tmp_path: Path) -> None:
    """A column of sound in Parquet is read as it is stored; nothing is decoded here."""
    rows = {
        "conversations": [[{"role": "user", "content": "<audio>What?"}, ANSWER]],
        "audio": [{"bytes": b"RIFF", "path": "a.wav"}],
        "audios": [[{"bytes": b"fLaC", "path": None}]],
    }
    table = Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))
    table.cast_column("audios", List(Audio(decode=False))).remove_columns("audios").to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0].messages[0].parts == (Media("audio", b"RIFF"), Text("What?"))
    lists = table.cast_column("audios", List(Audio(decode=False))).remove_columns("audio")
    lists.to_parquet(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[0].messages[0].parts == (Media("audio", b"fLaC"), Text("What?"))
