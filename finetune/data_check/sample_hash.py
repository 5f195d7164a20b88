"""Duplicate detection: hashes of the turns, text and media of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.sample import DataError, Media, Sample, Text, Track

MOST_READ = 2_000
"""Maximum number of records whose media files are read to compare them."""

Place = tuple[int, int]
"""A record: number of its data set, and its own number."""


def content_key(sample: Sample) -> int:
    """A hash of text, media kinds and media file sizes, without reading the media.

    Samples with equal keys are candidates; they are duplicates if their ``content_digest`` is equal too.
    """
    return int.from_bytes(_digest(sample, _state)[:7], "little")


def content_digest(sample: Sample, of_file: Callable[[Path], bytes]) -> bytes:
    """A hash of text and media contents: equal for exact duplicates only.

    Args:
        sample: the record.
        of_file: gives the digest of a file.

    Raises:
        OSError: a file cannot be read.
    """
    return _digest(sample, lambda medium: _content(medium, of_file))


def duplicate_groups(parts: Sequence[tuple[Sequence[Sample], Mapping[int, int]]]) -> list[list[Place]]:
    """Groups of exact duplicates, in the order of their first record.

    Media files are read only for records with equal ``content_key``, and for at most ``MOST_READ`` records.

    Args:
        parts: data sets, each with the ``content_key`` of its records by their number.
    """
    likely: dict[int, list[Place]] = {}
    for part, (_, found) in enumerate(parts):
        for index, key in found.items():
            likely.setdefault(key, []).append((part, index))
    of_file = cache(content_of_file)
    same: dict[bytes, list[Place]] = {}
    candidates = (place for group in likely.values() if len(group) > 1 for place in group)
    for part, index in islice(candidates, MOST_READ):
        try:
            digest = content_digest(parts[part][0][index], of_file)
        except (DataError, OSError):
            continue  # changed since the check
        same.setdefault(digest, []).append((part, index))
    return [group for group in same.values() if len(group) > 1]


def content_of_file(path: Path) -> bytes:
    """A digest of a file, or of all files of a folder of frames."""
    if path.is_dir():
        return b"".join(content_of_file(each) for each in sorted(path.iterdir()) if each.is_file())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _digest(sample: Sample, digest_of: Callable[[Media], bytes]) -> bytes:
    made = hashlib.blake2b(digest_size=16)
    made.update(b"" if sample.timeline is None else repr(sample.timeline).encode(errors="surrogatepass"))
    for message in (*sample.messages, *filter(None, [sample.rejected])):
        made.update(f"\0{message.role}\0{message.train}\0".encode())
        for part in message.parts:
            content = part.text.encode(errors="surrogatepass") if isinstance(part, Text) else digest_of(part)
            made.update(len(content).to_bytes(8, "little") + content)
    return made.digest()


def _state(medium: Media) -> bytes:
    if isinstance(medium.data, Track):
        return b"".join(f"{start} ".encode() + _state(clip) for start, clip in medium.data.clips)
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
    except OSError:  # just deleted: reading it raises later
        return -1


def _content(medium: Media, of_file: Callable[[Path], bytes]) -> bytes:
    if isinstance(medium.data, (Image.Image, np.ndarray)):
        return hashlib.blake2b(medium.data.tobytes(), digest_size=16).digest()
    if isinstance(medium.data, bytes):
        return medium.data
    if isinstance(medium.data, Track):
        return b"".join(f"{start} ".encode() + _content(clip, of_file) for start, clip in medium.data.clips)
    return b"".join(of_file(path) for path in medium.files)
