"""Recognises files of the wrong type (HTML, archives, Git LFS pointers, empty files) and says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from stat import S_ISDIR, S_ISREG

_HEAD = 512
_MARKUP = re.compile(
    rb"\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(!doctype\s+)?([a-z]+)", re.I | re.S
)
# Offset, magic bytes, type, remedy.
_MAGIC = (
    (0, b"%PDF-", "a PDF document", "save its pages as images"),
    (0, b"%!PS", "a PostScript document", "save it as PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS document", "save it as PNG"),
    (0, b"PK\x03\x04", "a zip archive", "unpack it and give what is in it"),
    (0, b"PK\x05\x06", "an empty zip archive", "download it again"),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it (gunzip, tar xzf) and give what is in it"),
    (0, b"BZh", "compressed by bzip2", "unpack it and give what is in it"),
    (0, b"\xfd7zXZ\0", "compressed by xz", "unpack it and give what is in it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it and give what is in it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give what is in it"),
    (0, b"Rar!\x1a\x07", "a rar archive", "unpack it and give what is in it"),
    (257, b"ustar", "a tar archive", "unpack it (tar xf) and give what is in it"),
)


def is_file(path: Path) -> bool:
    """Whether the path is a file; False for an invalid path, or one without permission."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether the path is a folder; False for an invalid path, or one without permission."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_special(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device: reading it might block, or never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (S_ISREG(mode) or S_ISDIR(mode))


def foreign(file: Path | bytes) -> str | None:
    """What a file of the wrong type is, and the remedy, to be appended to its name; None for any other file.

    Args:
        file: its path, or its content.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(file, bytes):
        return _told(file[:_HEAD], len(file))
    with file.open("rb") as opened:
        return _told(opened.read(_HEAD), file.stat().st_size)


def told(file: Path | bytes) -> str | None:
    """As ``foreign``, to explain an error: None where the file cannot be read."""
    try:
        return foreign(file)
    except (OSError, ValueError):
        return None


def _told(head: bytes, size: int) -> str | None:
    if not size:
        return "is empty (0 bytes): download or copy it again"
    if len(head) >= 64 and not head.strip(b"\0"):
        return f"begins with {len(head)} zero bytes, as interrupted copies do: download or copy it again"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
    if (markup := _MARKUP.match(head)) is not None:
        doctype, name = markup[1], markup[2].lower()
        if name == b"svg":
            return "is an SVG drawing: save it as PNG"
        if name == b"html" or (doctype is None and name in (b"head", b"body", b"title", b"script", b"meta")):
            return "is a web page (HTML), as failed downloads leave it: download the file again"
        if head.lstrip().startswith(b"<?xml"):
            return "is an XML document, as failed downloads leave it: download the file again"
    for offset, magic, kind, remedy in _MAGIC:
        if head.startswith(magic, offset):
            return f"is {kind}: {remedy}"
    return None
