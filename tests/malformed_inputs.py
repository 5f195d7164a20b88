"""Malformed records, data files and media: small valid ones, and what a random number generator makes of them."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

# Formats that Pillow both writes and reads here, and the mode in which it writes them.
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG": ("RGB", {}),
    "JPEG": ("RGB", {}),
    "JPEG CMYK": ("CMYK", {}),
    "JPEG progressive": ("RGB", {"progressive": True}),
    "WEBP": ("RGB", {}),
    "WEBP lossless": ("RGBA", {"lossless": True}),
    "GIF": ("P", {}),
    "BMP": ("RGB", {}),
    "DIB": ("RGB", {}),
    "TIFF": ("RGB", {}),
    "TIFF lzw": ("RGB", {"compression": "tiff_lzw"}),
    "TIFF jpeg": ("RGB", {"compression": "jpeg"}),
    "TIFF deep": ("I;16", {}),
    "TIFF float": ("F", {}),
    "PPM": ("RGB", {}),
    "PFM": ("F", {}),
    "JPEG2000": ("RGB", {}),
    "AVIF": ("RGB", {}),
    "ICO": ("RGBA", {}),
    "ICNS": ("RGBA", {"sizes": [(16, 16)]}),
    "PCX": ("RGB", {}),
    "SGI": ("RGB", {}),
    "MSP": ("1", {}),
    "XBM": ("1", {}),
    "DDS": ("RGB", {}),
    "TGA": ("RGB", {}),
    "TGA rle": ("RGB", {"compression": "tga_rle"}),
    "QOI": ("RGB", {}),
}


# Files of other kinds, and a word of what is said of each.
FOREIGN = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "page": (b"\n<!DOCTYPE html>\n<html lang=en>", "a web page"),
    "old page": (b"<html><head><title>404</title></head>", "a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    "svg": (b"<?xml version='1.0'?><!-- made --><svg xmlns=''/>", "an SVG drawing"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document"),
    "zip": (b"PK\x03\x04\x14\0\0\0", "a zip archive"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\3", "gzip"),
    "tar": (b"a.json".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    "xz": (b"\xfd7zXZ\0\0\4", "xz"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
}


def picture(kind: str, size: tuple[int, int] = (24, 16)) -> bytes:
    """A small picture in a format of PICTURES."""
    mode, options = PICTURES[kind]
    values = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    if mode == "F":
        image = Image.fromarray(values[..., 0].astype(np.float32) / 255)
    elif mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) << 8)
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, "PPM" if kind == "PFM" else kind.partition(" ")[0], **options)
    return file.getvalue()


def mutated(data: bytes, random: Random) -> bytes:
    """The bytes cut, with some of them changed, doubled, taken out, or with a number somewhere that is extreme."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        if not made:
            break
        at = random.randrange(len(made)) if random.random() < 0.5 else random.randrange(min(len(made), 64))
        kind = random.randrange(6)
        if kind == 0:
            del made[at:]
        elif kind == 1:
            made[at] = random.randrange(256)
        elif kind == 2:
            made[at : at + 4] = random.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80"))
        elif kind == 3:
            del made[at : at + random.randrange(1, 40)]
        elif kind == 4:
            made[at:at] = made[at : at + random.randrange(1, 40)]
        else:
            for _ in range(20):
                made[random.randrange(at, len(made))] = random.randrange(256)
    return bytes(made)


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", " ", "a" * 5000, "\x00", "\ud83d",
    "\x1b[31mred\x1b[0m", "é\u202e", "<image>", "<image_00>", "../../etc/passwd", "/", "file:///", "http://x/a.png",
    "data:,", "data:a;base64,!", "data:image/png;base64,AAAA", "iVBORw0KGgo" * 30, "/9j/" * 60, "[", "[1", '{"a"',
    "a.png\n", "a.png\0b", [], [[]], [None], [0], {}, {"a": {"b": [1]}}, {"bytes": "x"}, {"path": None},
    {"bytes": None, "path": "a.png"}, {"<image_00>": "a.png"}, {"url": 3}, [{"type": "image"}], [{"type": 7}],
    [{"type": "text", "text": None}], [["a", "b"]], [{"role": "user"}],
)  # fmt: skip


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """A good record of every form; its picture is a.png in the folder."""
    (folder / "a.png").write_bytes(picture("PNG"))
    (folder / "a.wav").write_bytes(wav())
    ask, reply = "<image>\nWhat is it?", "A dog."
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    tagged = [{"from": "human", "value": ask}, {"from": "gpt", "value": reply}]
    return {
        "official": {"id": "1", "image": "a.png", "conversations": turns},
        "official tags": {
            "id": "1",
            "image": {"<image_00>": "a.png", "<image_01>": "a.png"},
            "conversations": [{"role": "user", "content": "<image_00> or <image_01>?"}, turns[1]],
        },
        "sharegpt": {"conversations": tagged, "images": ["a.png"], "system": "Be brief."},
        "openai": {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]},
        "alpaca": {"instruction": ask, "input": "", "output": reply, "history": [["a", "b"]], "images": ["a.png"]},
        "sound": {"id": "1", "audio": "a.wav", "conversations": [{"role": "user", "content": "<audio>"}, turns[1]]},
    }


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a record."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*path, key)
        yield from places(each, (*path, key))


def replaced(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The record with another value in a place."""
    made = copy.deepcopy(record)
    inside: Any = made
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = copy.deepcopy(value)
    return made


def without(record: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """The record without a value."""
    made = copy.deepcopy(record)
    inside: Any = made
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    return made


def changed(record: dict[str, Any], random: Random) -> dict[str, Any]:
    """A record with one to three values replaced or taken out."""
    for _ in range(random.choice((1, 1, 2, 3))):
        found = list(places(record))
        if not found:
            break
        path = random.choice(found)
        record = without(record, path) if random.random() < 0.2 else replaced(record, path, random.choice(VALUES))
    return record


def wav(channels: int = 1, rate: int = 16_000, frames: int = 3200, bits: int = 16) -> bytes:
    """A WAV file of noise; the number of channels stands in its header."""
    width = bits // 8
    data = np.random.default_rng(1).integers(0, 255, min(channels, 9) * width * frames, dtype=np.uint8).tobytes()
    head = b"".join(
        number.to_bytes(size, "little")
        for number, size in (
            (1, 2),
            (channels, 2),
            (rate, 4),
            (rate * channels * width, 4),
            (channels * width, 2),
            (bits, 2),
        )
    )
    body = b"WAVEfmt " + len(head).to_bytes(4, "little") + head + b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(body).to_bytes(4, "little") + body


def json_texts() -> dict[str, bytes]:
    """Data files that are no JSON, or JSON that says strange things."""
    good = json.dumps(
        {"id": "1", "conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    )
    lines: dict[str, str | bytes] = {
        "empty": "",
        "blank": " \n\t\n",
        "nothing but a bracket": "[",
        "closed at once": "[]",
        "a number": "17",
        "null": "null",
        "a string": '"abc"',
        "an object of nothing": "{}",
        "not closed": f"[{good}",
        "a comma at the end": f"[{good},]",
        "two commas": f"[{good},,{good}]",
        "no comma": f"[{good} {good}]",
        "behind the end": f"[{good}] x",
        "single quotes": good.replace('"', "'"),
        "Python": good.replace('"1"', "None"),
        "a comment": f"// data\n[{good}]",
        "yaml": "- id: 1\n  text: x\n",
        "csv": "id,text\n1,x\n",
        "a page": "<!DOCTYPE html><html></html>",
        "a pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "xml": "<?xml version='1.0'?><a/>",
        "zip": b"PK\x03\x04" + b"\0" * 40,
        "gzip": b"\x1f\x8b\x08\0\0\0\0\0",
        "pdf": b"%PDF-1.7\n",
        "utf-16": good.encode("utf-16"),
        "utf-32": good.encode("utf-32"),
        "latin-1": good.replace("Q", "\xe9").encode("latin-1"),
        "zeros": bytes(100),
        "a zero inside": good.replace("Q", "\0"),
        "a zero in the text": good.replace("Q", "\\u0000"),
        "a bell inside": good.replace("Q", "\a"),
        "half a pair": good.replace("Q", "\\ud83d"),
        "half a pair in a key": good.replace('"id"', '"\\udc00"'),
        "half a pair in the id": good.replace('"1"', '"\\udc00"'),
        "a bad escape": good.replace("Q", "\\q"),
        "a short escape": good.replace("Q", "\\u12"),
        "4301 digits": good.replace('"1"', "1" * 4301),
        "4301 negative digits": good.replace('"1"', "-" + "1" * 4301),
        "4301 digits in the text": good.replace('"Q"', "1" * 4301),
        "1e999": good.replace('"1"', "1e999"),
        "NaN": good.replace('"1"', "NaN"),
        "-Infinity in the text": good.replace('"Q"', "-Infinity"),
        "a key twice": good.replace('"id": "1"', '"id": "1", "id": "2"'),
        "a key twice inside": good.replace('"role": "user"', '"role": "user", "role": "assistant"'),
        "nested deeply": "[" * 3000 + "]" * 3000,
        "a field nested deeply": good.replace('"1"', "[" * 900 + "]" * 900),
        "the text nested deeply": good.replace('"Q"', "[" * 900 + "]" * 900),
        "a mark in front": b"\xef\xbb\xbf" + good.encode(),
        "half of a line": good[: len(good) // 2],
        "a list in a list": f"[[{good}]]",
        "records and numbers": f"[{good}, 3]",
        "lines and an array": f"{good}\n[{good}]",
        "two on a line": f"{good} {good}",
        "an object over lines": json.dumps(json.loads(good), indent=1),
    }
    return {name: text if isinstance(text, bytes) else text.encode() for name, text in lines.items()}


Escape = tuple[str, BaseException]


def guarded(name: str, act: Callable[[], Any], allowed: tuple[type[BaseException], ...]) -> Escape | None:
    """What a call raises that it may not raise."""
    try:
        act()
    except allowed:
        return None
    except Exception as error:  # noqa: BLE001 - the point is to find any
        return name, error
    return None
