"""Media embedded in records (bytes, base64 text, ``data:`` URLs): recognises them by signature, and opens images."""

from __future__ import annotations

import base64
import binascii
import re

from PIL import Image

from finetune.media import image_files
from finetune.sample import DataError, MediaKind

# Base64 text that is long enough to be a file.
_TEXT = re.compile(r"[A-Za-z0-9+/\s]{80,}={0,2}\s*")
# Characters that are inspected; half of them may be line breaks. Four characters are three bytes.
_LETTERS = 64
_HEAD = re.compile(r"[A-Za-z0-9+/]{32}")
# File signatures: kind, offset, bytes.
_SIGNS: tuple[tuple[MediaKind, int, bytes], ...] = (
    ("image", 0, b"\xff\xd8\xff"),
    ("image", 0, b"\x89PNG\r\n\x1a\n"),
    ("image", 0, b"GIF8"),
    ("image", 8, b"WEBP"),
    ("image", 0, b"BM"),
    ("image", 0, b"II*\0"),
    ("image", 0, b"MM\0*"),
    ("image", 4, b"ftypavif"),
    ("audio", 8, b"WAVE"),
    ("audio", 0, b"fLaC"),
    ("audio", 0, b"OggS"),
    ("audio", 0, b"ID3"),
    ("audio", 0, b"\xff\xfb"),
    ("audio", 0, b"\xff\xf3"),
    ("audio", 4, b"ftypM4A"),
    ("video", 4, b"ftyp"),
    ("video", 0, b"\x1aE\xdf\xa3"),
)


def is_base64(text: str) -> bool:
    """Whether it may be base64 text of a file; a path of 80 characters may match too."""
    return _TEXT.fullmatch(text) is not None


def kind_of(data: bytes) -> MediaKind | None:
    """The kind of media by the file signature; None if unknown."""
    return next((kind for kind, at, sign in _SIGNS if data.startswith(sign, at)), None)


def kind_of_text(text: str) -> MediaKind | None:
    """The kind of media by the start of base64 text."""
    head = _HEAD.match("".join(text[:_LETTERS].split()))
    return None if head is None else kind_of(base64.b64decode(head[0]))


def bytes_of_base64(text: str, kind: MediaKind) -> bytes:
    """The bytes of base64 text that has the signature of its kind.

    Raises:
        DataError: another signature, or not base64.
    """
    found = kind_of_text(text)
    if found != kind:
        what = f"a file of {found}" if found else "no file that is known"
        raise DataError(
            f"{kind} {text[:40]!r}... ({len(text)} characters) is no path that exists; it looks like base64 "
            f"text, of {what}; give a path, or the base64 text of {A_FILE[kind]}"
        )
    return _bytes("".join(text.split()), text, kind)


def bytes_of_data_url(address: str, kind: MediaKind) -> bytes:
    """The bytes of a ``data:`` URL.

    Raises:
        DataError: it is not base64.
    """
    head, _, body = address.partition(",")
    if not head.endswith(";base64"):
        raise DataError(f"{kind} {address[:40]!r}...: data: URLs must be base64; give that or a path")
    return _bytes(body, address, kind)


def bytes_of_value(value: bytes | str, kind: MediaKind) -> bytes:
    """The bytes of a ``bytes`` value, which is base64 text in JSON.

    Raises:
        DataError: text that is not base64.
    """
    if isinstance(value, bytes):
        return value
    if value.startswith("data:"):
        return bytes_of_data_url(value, kind)
    return _bytes("".join(value.split()), value, kind)


def _bytes(body: str, shown: str, kind: MediaKind) -> bytes:
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{kind} {shown[:40]!r}...: not base64 ({error})") from error


A_FILE: dict[MediaKind, str] = {"image": "an image", "video": "a video", "audio": "an audio file"}


def opened(data: bytes, kind: MediaKind) -> Image.Image | bytes:
    """An image with its header read, or the bytes of an audio file; the encoder decodes them.

    Raises:
        DataError: a damaged image, or a video.
    """
    if kind == "audio":
        return data
    if kind != "image":
        raise DataError(
            f"{A_FILE[kind]} of {len(data)} bytes inside the record is not supported; write it to a file and "
            "give its path"
        )
    return image_files.decode(data, "an image inside the record")
