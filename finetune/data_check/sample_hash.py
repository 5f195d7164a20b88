"""What tells records apart: their turns, their text and their media."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.sample import DataError, Media, Sample, Text

MOST_READ = 2_000
"""Records whose media are read to tell whether they are the same."""

Place = tuple[int, int]
"""A record, by the number of its data set and its own."""


def likeness(sample: Sample) -> int:
    """A number that records have in common when their text is the same and their media have the same sizes.

    No medium is read. Records with the same number are the same only when ``identity`` says so too.
    """
    return int.from_bytes(_digest(sample, _state)[:7], "little")


def identity(sample: Sample, of_file: Callable[[Path], bytes]) -> bytes:
    """What records have in common only when their text and their media are the same, byte for byte.

    Args:
        sample: the record.
        of_file: what tells the contents of a file.

    Raises:
        OSError: a file cannot be read.
    """
    return _digest(sample, lambda medium: _content(medium, of_file))


def repeated(parts: Sequence[tuple[Sequence[Sample], Mapping[int, int]]]) -> list[list[Place]]:
    """Groups of records with the same text and the same media, byte for byte, in the order of their first.

    Media are read only where the text and the sizes of files agree, and of no more than ``MOST_READ`` records.

    Args:
        parts: data sets, each with the likeness of its records by their number.
    """
    likely: dict[int, list[Place]] = {}
    for part, (_, found) in enumerate(parts):
        for index, alike in found.items():
            likely.setdefault(alike, []).append((part, index))
    of_file = cache(content_of_file)
    same: dict[bytes, list[Place]] = {}
    candidates = (place for group in likely.values() if len(group) > 1 for place in group)
    for part, index in islice(candidates, MOST_READ):
        try:
            key = identity(parts[part][0][index], of_file)
        except (DataError, OSError):
            continue  # it has changed since the check, which is the place to say so
        same.setdefault(key, []).append((part, index))
    return [group for group in same.values() if len(group) > 1]


def content_of_file(path: Path) -> bytes:
    """A digest of a file, or of all files of a folder of frames."""
    if path.is_dir():
        return b"".join(content_of_file(each) for each in sorted(path.iterdir()) if each.is_file())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _digest(sample: Sample, tell: Callable[[Media], bytes]) -> bytes:
    made = hashlib.blake2b(digest_size=16)
    for message in sample.messages:
        made.update(f"\0{message.role}\0{message.train}\0".encode())
        for part in message.parts:
            told = part.text.encode(errors="surrogatepass") if isinstance(part, Text) else tell(part)
            made.update(len(told).to_bytes(8, "little") + told)
    return made.digest()


def _state(medium: Media) -> bytes:
    if isinstance(medium.data, Image.Image):
        sizes = list(medium.data.size)
    elif isinstance(medium.data, (bytes, np.ndarray)):
        sizes = [len(medium.data)]
    else:
        sizes = [_size(path) for path in medium.files]
    return f"{medium.kind} {sizes}".encode()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it has just gone; what reads it will say so
        return -1


def _content(medium: Media, of_file: Callable[[Path], bytes]) -> bytes:
    if isinstance(medium.data, (Image.Image, np.ndarray)):
        return hashlib.blake2b(medium.data.tobytes(), digest_size=16).digest()
    if isinstance(medium.data, bytes):
        return medium.data
    return b"".join(of_file(path) for path in medium.files)
