"""Reads a full-duplex record of minicpm-o5-sdk into messages and a timeline, and finds its audio files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune import duplex_sdk
from finetune.data_files.json_values import json_cell
from finetune.duplex_sdk import AlignedRecord, TimedClip
from finetune.readers import record_keys
from finetune.readers.record_media import MediaFolders, find_media_file
from finetune.sample import DataError, Media, Message, Part, Text, Track
from finetune.timeline import Timeline
from finetune.utils.quoting import shown, words_of


def read_record(
    record: Mapping[str, Any], where: MediaFolders
) -> tuple[tuple[Message, ...], Timeline, tuple[str, ...]]:
    """Messages, timeline and notes of a record of minicpm-o5-sdk.

    The record is what ``O5DuplexTrainingData.dump_structure`` gives, with 'id' allowed beside it; paths are relative
    as in other formats. Its timeline has the turns for the native prompt, and the ids for the prompt o45_fc.

    Raises:
        DataError: an unknown key, a record that the package refuses, or a missing file.
        UserError: the package is missing, or of another version.
    """
    known = (record_keys.IDENTITY, *record_keys.SDK_KEYS)
    if unknown := [key for key in record if key not in known]:
        raise DataError(
            f"has the key {shown(unknown[0], 60)}, which is not read in a record of {duplex_sdk.PACKAGE}; known are "
            f"{words_of(known)}: remove it"
        )
    aligned = duplex_sdk.align_record({key: json_cell(record[key]) for key in record_keys.SDK_KEYS if key in record})
    system = tuple(_system(aligned, where))
    track = Track(
        tuple((clip.start, _media(clip, where)) for clip in aligned.user),
        aligned.units,
        fixed=True,
        samples=tuple(clip.samples for clip in aligned.user),
    )
    heard: tuple[Part, ...] = (Media("audio", track),) if track.clips else ()
    said = Message("assistant", tuple(Text(turn.text) for turn in aligned.turns), train=True)
    messages = (*([Message("system", system)] if system else ()), Message("user", heard), said)
    timeline = Timeline(aligned.turns, prepared=aligned.prepared, unsupported=_unsupported(aligned, system, heard))
    return messages, timeline, aligned.notes


def _unsupported(aligned: AlignedRecord, system: tuple[Part, ...], heard: tuple[Part, ...]) -> tuple[str, ...]:
    """What the native prompt has no place for."""
    found = list(aligned.unsupported)
    if not heard:
        found.append("no user audio")
    if sum(isinstance(part, Media) for part in system) > 1 or any(isinstance(part, Media) for part in system[:-1]):
        found.append("audio in the system turn before text or other audio")
    return tuple(found)


def _system(aligned: AlignedRecord, where: MediaFolders) -> Iterator[Part]:
    for part in aligned.system:
        yield Text(part) if isinstance(part, str) else _media(part, where)


def _media(clip: TimedClip, where: MediaFolders) -> Media:
    if not clip.path:
        raise DataError(f"{clip.where} has no file_path; give the path of its audio file")
    return Media("audio", find_media_file(clip.path, "audio", where))
