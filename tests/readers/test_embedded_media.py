"""Media inside of records: bytes and base64 text, however a file of records holds them."""

from __future__ import annotations

import base64
import io
import json
import wave
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from finetune.readers import read
from finetune.sample import DataError, Sample

MANY = {"image": "images", "audio": "audios"}


def picture(suffix: str = "png") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((16, 12), 80).convert("RGB").save(file, suffix)
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(bytes(64))
    return file.getvalue()


def record(form: str, value: Any, kind: str = "image") -> dict[str, Any]:
    if form == "part":
        asked = [{"type": kind, kind: value}, {"type": "text", "text": "What?"}]
        answer = [{"type": "text", "text": "A."}]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    turns = [{"role": "user", "content": f"<{kind}>What?"}, {"role": "assistant", "content": "A."}]
    if form == "alpaca":
        return {"instruction": f"<{kind}>What?", "output": "A.", MANY[kind]: value}
    return {"conversations": turns, kind if form == "official" else MANY[kind]: value}


FORMS = ("official", "sharegpt", "alpaca", "part")


def seen(sample: Sample, kind: Any = "image") -> Any:
    (medium,) = sample.media(kind)
    return medium.data.size if isinstance(medium.data, Image.Image) else medium.data


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_base64_in_json(tmp_path: Path, form: str, suffix: str) -> None:
    """With and without data: in front, with line breaks, without padding, and as the bytes of an object."""
    data = picture(suffix)
    text = base64.b64encode(data).decode()
    ways: list[Any] = [text, f"data:image/{suffix};base64,{text}", base64.encodebytes(data).decode(), text.rstrip("=")]
    ways += [{"bytes": text}, {"bytes": f"data:image/{suffix};base64,{text}", "path": "gone.png"}]
    (tmp_path / "data.json").write_text(json.dumps([record(form, way) for way in ways]))
    assert [seen(sample) for sample in read(tmp_path / "data.json")] == [(16, 12)] * len(ways)


@pytest.mark.parametrize("form", FORMS)
def test_sound_in_json(tmp_path: Path, form: str) -> None:
    data = sound()
    text = base64.b64encode(data).decode()
    ways: list[Any] = [text, {"bytes": text}, f"data:audio/wav;base64,{text}"]
    (tmp_path / "data.json").write_text(json.dumps([record(form, way, "audio") for way in ways]))
    assert [seen(sample, "audio") for sample in read(tmp_path / "data.json")] == [data] * 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_binary_columns(tmp_path: Path, form: str, kind: str, binary: pa.DataType) -> None:
    """A plain column of bytes, as pandas and pyarrow write it; one value, or a list of them."""
    data = picture() if kind == "image" else sound()
    rows = [record(form, [data] if many else data, kind) for many in ((False,) if form == "part" else (False, True))]
    for number, row in enumerate(rows):
        table = pa.Table.from_pylist([row])
        for place, field in enumerate(table.schema):
            if pa.types.is_binary(field.type):
                table = table.set_column(place, field.name, table.column(place).cast(binary))
        parquet.write_table(table, tmp_path / f"{number}.parquet")
        wanted = (16, 12) if kind == "image" else data
        assert seen(read(tmp_path / f"{number}.parquet")[0], kind) == wanted


def test_a_file_of_that_name_comes_first(tmp_path: Path) -> None:
    name = "iVBORw0KGgo" + "a" * 100
    Image.new("RGB", (5, 5)).save(tmp_path / name, "png")
    (tmp_path / "data.json").write_text(json.dumps([record("official", name)]))
    assert seen(read(tmp_path / "data.json")[0]) == tmp_path / name


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (base64.b64encode(picture()).decode()[:101], "image", "'iVBORw0KGgo.{29}'...: not base64"),
        (base64.b64encode(picture()).decode()[:120], "image", r"an image inside the record \(90 bytes\) "),
        (base64.b64encode(bytes(range(90))).decode(), "image", r"looks like base64 text, of no file that is known"),
        (base64.b64encode(sound() + bytes(90)).decode(), "image", "of a file of audio; give a path, or .* of an image"),
        (base64.b64encode(picture()).decode(), "audio", "of a file of image; give a path, or .* of an audio file"),
        ({"bytes": "not base64!"}, "image", "'not base64!'...: not base64"),
        ({"bytes": [1, 2]}, "image", "has a list under 'bytes'; give base64 text, or a path"),
        (base64.b64encode(b"\0\0\0\x18ftypmp42" + bytes(80)).decode(), "image", "of a file of video"),
        ({"bytes": base64.b64encode(bytes(9)).decode()}, "image", r"an image inside the record \(9 bytes\)"),
    ],
)
def test_what_is_refused(tmp_path: Path, value: Any, kind: str, message: str) -> None:
    (tmp_path / "data.json").write_text(json.dumps([record("sharegpt", [value], kind)]))
    with pytest.raises(DataError, match=f"record 0: .*{message}") as caught:
        read(tmp_path / "data.json")[0]
    assert len(str(caught.value)) < 400
