"""Wraps minicpm-o5-sdk: aligns a full-duplex record to one-second units and tokenizes it with prompt o45_fc.

The package loads the files of its tokenizer with remote code on. Here they are loaded by the tokenizer class of
transformers that the remote code derives from, and the package checks the result against its own fingerprints.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.sample import DataError
from finetune.timeline import LOOK_AHEAD_MS, SDK_VERSION, UNIT_MS, PreparedIds, SpokenTurn
from finetune.utils.errors import UserError

PACKAGE = "minicpm-o5-sdk"
_TARGET = "o45_fc"
# The name that the fingerprints of the package have.
_TOKENIZER_CLASS = "MiniCPMOTokenizerFast"
_KEPT = 64


@dataclass(frozen=True, slots=True)
class TimedClip:
    """An audio file of a record.

    Attributes:
        where: its place in the record, for messages.
        path: as the record has it.
        samples: number of samples at 16 kHz that the record states.
        start: sample of the timeline at which it starts.
    """

    where: str
    path: str | None
    samples: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class AlignedRecord:
    """A record as the package aligns it.

    Attributes:
        units: number of one-second units.
        system: texts and clips of the system turn, in order.
        user: clips of user audio.
        turns: turns of the model; the words of a unit have one time, which belongs to that unit.
        prepared: its ids and labels.
        unsupported: what the native prompt has no place for, in words.
        notes: what the package says of a record that it takes.
    """

    units: int
    system: tuple[str | TimedClip, ...]
    user: tuple[TimedClip, ...]
    turns: tuple[SpokenTurn, ...]
    prepared: PreparedIds
    unsupported: tuple[str, ...]
    notes: tuple[str, ...]


def align_record(record: Mapping[str, Any]) -> AlignedRecord:
    """Aligns a record of the package; no media file is opened.

    Raises:
        DataError: the package refuses the record, with the place in it; or it has video, or units of another length.
        UserError: the package is missing, or of another version.
    """
    try:
        text = json.dumps(record)
    except TypeError as error:
        raise DataError(f"has a value that no JSON of {PACKAGE} has ({error}); give paths of files") from error
    return _aligned(text)


@lru_cache(maxsize=_KEPT)
def _aligned(text: str) -> AlignedRecord:
    package, tokenizer = _package(), _tokenizer()
    with _refused():
        data = package.O5DuplexTrainingData.load_structure(json.loads(text))
    if data.tracks.user_video is not None and data.tracks.user_video.segments:
        raise DataError("tracks.user_video has segments, whose files the package does not decode; remove them")
    if data.unit_policy.unit_sec != 1.0:
        raise DataError(f"unit_policy.unit_sec is {data.unit_policy.unit_sec:g}; only units of 1.0 second are read")
    with _refused():
        result = data.tokenize(tokenizer=tokenizer)
    tokens = result.tokenized_data
    return AlignedRecord(
        len(tokens.unit_spans),
        tuple(_system(data)),
        tuple(_user(result.arrangement.tracks)),
        tuple(_turns(result.arrangement.tracks)),
        PreparedIds(tuple(tokens.input_ids), tuple(tokens.labels)),
        tuple(_unsupported(data)),
        tuple(dict.fromkeys(f"{PACKAGE} reports {issue.code}" for issue in tokens.validation_report.issues)),
    )


@cache
def _package() -> Any:
    """The package.

    Raises:
        UserError: it is missing, or of another version.
    """
    install = f"pip install '{PACKAGE}=={SDK_VERSION}' (or the extra duplex)"
    try:
        found = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise UserError(f"records of {PACKAGE} are read by that package, which is not installed: {install}") from error
    if found != SDK_VERSION:
        raise UserError(
            f"{PACKAGE} {found} is installed, and {SDK_VERSION} is needed: versions give other ids to the same record. "
            f"Install it: {install}"
        )
    try:
        return importlib.import_module("minicpm_o5_sdk")  # an extra
    except ImportError as error:
        raise UserError(f"{PACKAGE} cannot be imported ({error}): {install}") from error


@cache
def _tokenizer() -> Any:
    """The package's tokenizer for o45_fc, built from its files without remote code and checked by the package."""
    from transformers import Qwen2Tokenizer

    tokenizers: Any = importlib.import_module("minicpm_o5_sdk.tokenizers")
    root = Path(tokenizers.__file__).parent
    bundle = root / "bundles" / tokenizers.BUILTIN_O45_FC_BUNDLE_ID
    manifest = tokenizers.MiniCPMOTokenizerBundleManifest.model_validate_json((bundle / "manifest.json").read_bytes())
    base = type(_TOKENIZER_CLASS, (Qwen2Tokenizer,), {})
    loaded = base.from_pretrained(root / "base_tokenizers" / manifest.base_tokenizer_ref)
    adapter = tokenizers.MiniCPMO45FcTokenizerAdapter(
        tokenizer=loaded, target=_TARGET, name_or_path=manifest.base_tokenizer_ref
    )
    made = tokenizers.MiniCPMO45FcTokenizer(bundle_path=bundle, manifest=manifest, base_adapter=adapter)
    made.validate_bundle()
    return made


@contextmanager
def _refused() -> Iterator[None]:
    """Turns what the package raises about a record into one line.

    Raises:
        DataError: with it.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise DataError(_refusal(error)) from error


def _refusal(error: Exception) -> str:
    """The message of a record that the package refuses: where, and its own words, which are mostly Chinese."""
    found: Any = getattr(error, "errors", None)
    faults: list[Any] = list(found())[:3] if callable(found) else []  # pyright: ignore[reportArgumentType]
    said = []
    for fault in faults:  # pydantic's
        place = ".".join(map(str, fault["loc"])) or "the record as a whole"
        own = str(fault["msg"]).removeprefix("Value error, ")
        said.append(f"{place}: {own if fault['type'] != 'value_error' else f'values that disagree ({own})'}")
    text = "; ".join(said) or " ".join(str(error).split()) or type(error).__name__
    return (
        f"{PACKAGE} {SDK_VERSION} refuses the record: {' '.join(text.split())[:600]}. Correct what is named (triggers "
        "must refer to segments that exist, words must add up to their text, audio must have a duration above 0)"
    )


def _clip(audio: Any, where: str, start: float = 0.0) -> TimedClip:
    return TimedClip(where, audio.file_path, round(audio.duration_sec * 16_000), round(start * 16_000))


def _system(data: Any) -> Iterator[str | TimedClip]:
    for number, segment in enumerate(data.system.segments if data.system else ()):
        yield segment.text if segment.kind == "text" else _clip(segment.audio, f"system.segments[{number}]")


def _user(tracks: Any) -> Iterator[TimedClip]:
    for number, segment in enumerate(tracks.user_audio.segments if tracks.user_audio else ()):
        yield _clip(segment.audio, f"tracks.user_audio.segments[{number}]", segment.timeline.timeline_start_sec)


def _turns(tracks: Any) -> Iterator[SpokenTurn]:
    for turn in tracks.ai_spoken.turns:
        words: list[tuple[int, int]] = []
        text = ""
        for index in turn.source_segment_indices:
            for each in tracks.ai_spoken.segments[index].slices:
                if each.text:
                    words.append((len(text), each.unit_index * UNIT_MS + LOOK_AHEAD_MS))
                    text += each.text
        if words:
            yield SpokenTurn(text, tuple(words))


def _unsupported(data: Any) -> Iterator[str]:
    if data.system and data.system.tools:
        yield "tools"
    if data.tracks.input_event.segments:
        yield "events"
    kinds = {"think": "thinking", "tool_call": "tool calls", "text": "text that is not spoken"}
    for kind in dict.fromkeys(segment.content.kind for segment in data.tracks.ai_non_spoken.segments):
        yield kinds[kind]
