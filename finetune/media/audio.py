"""Sound files to waveforms: one channel, 16 kHz, float32."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.sample import DataError, Media, Source

RATE = 16_000
"""Samples per second of every waveform."""
MAX_SECONDS = 1800
"""Longest clip that is decoded; at 10 to 25 tokens per second it is more than any context holds."""

# Clips kept decoded: a sample is measured first, then encoded.
_KEPT = 8
# Containers whose header tells the length exactly; in the others it is estimated or absent.
_EXACT = {"wav", "w64", "flac", "aiff", "mov", "mp4", "m4a"}
# Seconds that may be missing: coders add and remove a little at both ends.
_SLACK = 0.25


class _UnusableError(Exception):
    """What is wrong with a file, without its place."""


def load(media: Media, source: Source) -> np.ndarray:
    """The waveform of a clip, (samples,) float32 at 16 kHz, about -1 to 1; of a video file its first sound track.

    Several channels are averaged into one, other rates resampled by FFmpeg's swresample with its default filter. The
    array is shared: do not write into it.

    Raises:
        DataError: no such file, not sound, no sound in it, truncated or damaged, or longer than MAX_SECONDS.
        UserError: PyAV is not installed.
    """
    try:
        if isinstance(media.data, Path):
            state = media.data.stat()
            return _of_file(media.data, state.st_size, state.st_mtime_ns)
        if isinstance(media.data, bytes):
            return _decode(io.BytesIO(media.data))
        if isinstance(media.data, np.ndarray):
            return _given(media.data)
    except FileNotFoundError as error:
        raise DataError(f"{source}: {media} does not exist; correct the path or remove the record") from error
    except OSError as error:
        raise DataError(f"{source}: {media} cannot be read ({error}); replace it or remove the record") from error
    except _UnusableError as error:
        raise DataError(f"{source}: {media} {error}") from error
    raise DataError(f"{source}: {media} is no sound; give the path of a sound file or samples at 16 kHz")


def av() -> Any:
    """PyAV.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("av")  # an extra
    except ImportError as error:
        raise UserError(f"sound files are decoded by PyAV ({error}): pip install 'av>=14,<19'") from error


@lru_cache(maxsize=_KEPT)
def _of_file(path: Path, size: int, changed: int) -> np.ndarray:
    """The waveform of a file in this state."""
    if path.is_dir():
        raise _UnusableError("is a folder; give the path of a sound file")
    if not size:
        raise _UnusableError("is empty (0 bytes); replace it or remove the record")
    return _decode(str(path))


def _given(samples: np.ndarray) -> np.ndarray:
    """Samples that a caller has decoded."""
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise _UnusableError(
            f"has shape {samples.shape} and type {samples.dtype}; give one channel of floats at 16 kHz, as "
            "librosa.load(path, sr=16000, mono=True) does"
        )
    return _checked(samples.astype(np.float32, copy=False))


def _decode(file: str | io.BytesIO) -> np.ndarray:
    chunks, total = [], 0
    with _opened(file) as (container, stream):
        for chunk in _resampled(container, stream):
            chunks.append(chunk)
            total += len(chunk)
            if total > MAX_SECONDS * RATE:
                raise _UnusableError(_too_long())
        declared = _declared_seconds(container, stream)
    if declared is not None and total / RATE < declared - _SLACK:
        raise _UnusableError(
            f"is truncated: it ends after {total / RATE:.2f} of {declared:.2f} seconds; replace it or remove the record"
        )
    return _checked(np.concatenate(chunks) if chunks else np.zeros(0, np.float32))


def _checked(samples: np.ndarray) -> np.ndarray:
    if not len(samples):
        raise _UnusableError("has no sound in it (0 samples); replace it or remove the record")
    if len(samples) > MAX_SECONDS * RATE:
        raise _UnusableError(_too_long())
    if not np.isfinite(samples).all():
        raise _UnusableError("has samples that are not finite; replace it or remove the record")
    return samples


def _too_long() -> str:
    return f"is longer than {MAX_SECONDS} seconds; cut it into shorter clips, each with its own question"


@contextmanager
def _opened(file: str | io.BytesIO) -> Iterator[tuple[Any, Any]]:
    """The container and its first sound track; what goes wrong inside becomes _UnusableError."""
    library = av()
    try:
        # Broken text in the tags of a file is no reason to refuse its sound.
        with library.open(file, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise _UnusableError("has no sound track; give a file with sound, or remove it from the record")
            yield container, container.streams.audio[0]
    except (library.FFmpegError, ValueError, EOFError) as error:
        raise _UnusableError(
            f"cannot be decoded as sound ({error}); the file is no sound, truncated or damaged: save it as WAV, "
            "replace it or remove the record"
        ) from error


def _resampled(container: Any, stream: Any) -> Iterator[np.ndarray]:
    """The samples of a stream in pieces, float32, one channel, 16 kHz."""
    resampler = av().AudioResampler(format="flt", layout="mono", rate=RATE)
    for frame in container.decode(stream):
        frame.pts = None  # gaps and jumps in time are not filled
        for piece in resampler.resample(frame):
            yield piece.to_ndarray()[0]
    for piece in resampler.resample(None):
        yield piece.to_ndarray()[0]


def _declared_seconds(container: Any, stream: Any) -> float | None:
    """How long the header says that the stream is, where it knows."""
    if not _EXACT & set(container.format.name.split(",")) or stream.duration is None:
        return None
    return float(stream.duration * stream.time_base)
