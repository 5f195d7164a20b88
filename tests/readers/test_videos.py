"""A video of a record is a file, a folder of frames or a list of frames, in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.readers import read
from finetune.sample import Media

ANSWER = {"role": "assistant", "content": "A dog."}


def asked(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shots").mkdir()
    for name in ("shots/1.png", "shots/2.png", "a.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    (tmp_path / "clip.mp4").write_bytes(b"")
    return tmp_path


def parts(folder: Path, record: dict[str, Any]) -> list[Any]:
    path = folder / "data.json"
    path.write_text(json.dumps([record]))
    (sample,) = read(path)
    assert all(part.kind == "video" for part in sample.media() if part.data != folder / "a.png")
    return [part.data if isinstance(part, Media) else part.text for part in sample.messages[0].parts]


@pytest.mark.parametrize(
    ("value", "files"),
    [("clip.mp4", "clip.mp4"), ("shots", "shots"), (["shots/1.png", "a.png"], ("shots/1.png", "a.png"))],
)
def test_forms(folder: Path, value: Any, files: Any) -> None:
    data = tuple(folder / name for name in files) if isinstance(files, tuple) else folder / files
    nested = [value] if isinstance(value, list) else value
    assert parts(folder, asked("<video>Why?", videos=[value])) == [data, "Why?"]
    assert parts(folder, asked([{"type": "video", "video": value}, {"type": "text", "text": "Why?"}])) == [data, "Why?"]
    assert parts(folder, {"instruction": "<video>Why?", "output": "So.", "videos": [value]}) == [data, "Why?"]
    turns = asked("Look: <video> Why?")["messages"]
    assert parts(folder, {"id": "1", "conversations": turns, "video": nested}) == ["Look: ", data, " Why?"]


def test_several_and_images(folder: Path) -> None:
    record = asked("<video><image> and <video>", images=["a.png"], videos=[["shots/1.png", "shots/2.png"], "clip.mp4"])
    frames = (folder / "shots/1.png", folder / "shots/2.png")
    assert parts(folder, record) == [frames, folder / "a.png", " and ", folder / "clip.mp4"]
