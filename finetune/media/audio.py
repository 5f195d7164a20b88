"""Sound files to waveforms: one channel, 16 kHz, float32."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune.sample import DataError, Media, Source
from finetune.utils.errors import UserError
from finetune.utils.file_types import told
from finetune.utils.quoting import reason

RATE = 16_000
"""Samples per second of every waveform."""
MAX_CHANNELS = 8
"""Most channels of a clip (7.1). Files of very many are refused by their header: FFmpeg fails at them, or ends the
process."""
MAX_SECONDS = 1800
"""Longest clip that is decoded; at 10 to 25 tokens per second it is more than any context holds."""

# Containers that are read. Playlists and patterns are none of them: they name further files or addresses.
_OPTIONS = {
    "format_whitelist": "wav,w64,aiff,au,caf,flac,mp3,ogg,opus,aac,ac3,eac3,amr,amrnb,amrwb,ape,wv,tta,"
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf",
    "protocol_whitelist": "file",
}
# Clips kept decoded: a sample is measured first, then encoded.
_KEPT = 8
# Containers whose header tells the length; in the others it is estimated or absent, and so in some of these.
_TOLD = {"flac", "mov", "mp4", "m4a", "matroska", "webm"}
# Those whose header tells it in bytes, and from where on it is the stand-in of a writer that could not know.
_COUNTED, _UNKNOWN = {"wav", "aiff"}, 0x7FFF0000
# Seconds that may be missing at the end: coders add and remove a little.
_SLACK = 0.25


class _UnusableError(Exception):
    """What is wrong with a file, without its place."""


def load(media: Media, source: Source) -> np.ndarray:
    """The waveform of a clip, (samples,) float32 at 16 kHz, about -1 to 1; of a video file its first sound track.

    Other rates are resampled by FFmpeg's swresample with its default filter, several channels averaged into one. The
    array is shared: do not write into it.

    Raises:
        DataError: no such file, not sound, no sound in it, truncated or damaged, or longer than MAX_SECONDS.
        UserError: PyAV is not installed.
    """
    try:
        if isinstance(media.data, Path):
            state = media.data.stat()
            return _of_file(media.data, state.st_size, state.st_mtime_ns, state.st_ino, state.st_ctime_ns)
        if isinstance(media.data, bytes):
            return _decode(media.data)
        if isinstance(media.data, np.ndarray):
            return _given(media.data)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{source}: {media} does not exist; correct the path or remove the record") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{source}: {media} cannot be read ({reason(error)}); replace it or remove the record"
        ) from error
    except _UnusableError as error:
        known = told(media.data) if isinstance(media.data, (Path, bytes)) else None
        raise DataError(f"{source}: {media} {known or error}") from error
    raise DataError(f"{source}: {media} is no sound; give the path of a sound file or samples at 16 kHz")


def av() -> Any:
    """PyAV.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("av")  # an extra
    except ImportError as error:
        raise UserError(f'sound is decoded by PyAV ({error}); install it: pip install "av>=14,<19"') from error


@lru_cache(maxsize=_KEPT)
def _of_file(path: Path, size: int, *_: int) -> np.ndarray:
    """The waveform of a file in this state."""
    if path.is_dir():
        raise _UnusableError("is a folder; give the path of a sound file")
    if not size:
        raise _UnusableError("is empty (0 bytes); replace it or remove the record")
    return _decode(path)


def _given(samples: np.ndarray) -> np.ndarray:
    """Samples that a caller has decoded."""
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise _UnusableError(
            f"has shape {samples.shape} and type {samples.dtype}; give one channel of floats at 16 kHz, as "
            "librosa.load(path, sr=16000, mono=True) does"
        )
    return _checked(samples.astype(np.float32, copy=False))


def _decode(file: Path | bytes) -> np.ndarray:
    """The waveform of a file, or of the bytes of one."""
    chunks, total, end, short = [], 0, 0.0, False
    with _opened(str(file) if isinstance(file, Path) else io.BytesIO(file)) as (container, stream):
        # The channels are averaged below: swresample would add them up, louder than either. They come in one plane,
        # because PyAV cannot count the planes of 8 channels and more.
        resampler = av().AudioResampler(format="flt", rate=RATE)
        for packet in chain(container.demux(stream), [None]):
            short |= packet is not None and packet.is_corrupt
            # Behind the last packet the resampler gives what it still holds.
            for frame in [None] if packet is None else packet.decode():
                if frame is not None:
                    end = max(end, (frame.time or 0.0) + frame.samples / frame.sample_rate)
                    frame.pts = None  # gaps and jumps in time are not filled
                for piece in resampler.resample(frame):
                    planes = piece.to_ndarray().reshape(piece.samples, -1).T
                    chunks.append(np.ascontiguousarray(planes).mean(axis=0))
                    total += len(chunks[-1])
            if total > MAX_SECONDS * RATE:
                raise _UnusableError(_too_long())
        told = _told_end(file, container, stream)
    if (told is not None and end < told - _SLACK) or (short and _states_bytes(file, container)):
        length = "" if told is None or end >= told else f" of {told:.2f}"
        raise _UnusableError(
            f"is truncated: it ends after {end:.2f}{length} seconds, before its header says so; replace it or remove "
            "the record"
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
    _check_channels(_channels(_head(file if isinstance(file, str) else file.getvalue())))
    try:
        # Broken text in the tags of a file is no reason to refuse its sound.
        with library.open(file, metadata_errors="ignore", options=_OPTIONS) as container:
            if not container.streams.audio:
                raise _UnusableError("has no sound track; give a file with sound, or remove it from the record")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise _UnusableError("has sound in a coding that FFmpeg does not know; save it as WAV")
            _check_channels(stream.codec_context.channels)
            yield container, stream
    except (library.FFmpegError, ValueError, EOFError, IndexError) as error:
        raise _UnusableError(
            f"cannot be decoded as sound ({error}); the file is no sound, truncated or damaged: save it as WAV, "
            "replace it or remove the record"
        ) from error


def _told_end(file: Path | bytes, container: Any, stream: Any) -> float | None:
    """The second at which the sound ends by the header, where it knows."""
    names = set(container.format.name.split(","))
    if not (_TOLD & names or ("mp3" in names and _mp3_told(_head(file)))):
        return None
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration is not None:
        return start + float(stream.duration * stream.time_base)
    # Of a video it may be the length of the pictures.
    return None if container.streams.video or not container.duration else container.duration / 1_000_000


def _mp3_told(head: bytes) -> bool:
    """Whether the first frame says how many there are."""
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def _states_bytes(file: Path | bytes, container: Any) -> bool:
    """Whether the header says how many bytes there are; one written into a pipe does not."""
    size = _head(file)[4:8]
    order = "big" if container.format.name == "aiff" else "little"
    return container.format.name in _COUNTED and 0 < int.from_bytes(size, order) < _UNKNOWN


def _check_channels(count: int | None) -> None:
    if count is not None and count > MAX_CHANNELS:
        raise _UnusableError(f"has {count} channels, and at most {MAX_CHANNELS} are read; mix it down to one or two")


def _channels(head: bytes) -> int | None:
    """Channels by the header of WAV, W64, AIFF, AU and CAF files, the formats that hold any number; None of others."""
    if head[:4] in (b"RIFF", b"RF64", b"RIFX", b"BW64"):
        return _number(head, b"fmt ", 10, 2, "big" if head[:4] == b"RIFX" else "little")
    if head[:4] == b"riff":
        return _number(head, b"fmt ", 26, 2, "little")
    if head[:4] == b"FORM":
        return _number(head, b"COMM", 8, 2, "big")
    if head[:4] == b".snd":
        return int.from_bytes(head[20:24], "big")
    return _number(head, b"desc", 36, 4, "big") if head[:4] == b"caff" else None


def _number(head: bytes, chunk: bytes, at: int, size: int, order: Literal["little", "big"]) -> int | None:
    """A number so many bytes behind the name of a chunk; None where that is not near the beginning."""
    start = head.find(chunk, 8 if chunk == b"desc" else 12)
    value = head[start + at : start + at + size]
    return int.from_bytes(value, order) if start >= 0 and len(value) == size else None


def _head(file: Path | str | bytes) -> bytes:
    """The first bytes, without the tags in front of an MP3."""
    with io.BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb") as opened:
        start = opened.read(10)
        if start[:3] != b"ID3":
            return start + opened.read(2048)
        # Seven bits per byte.
        size = sum(byte << shift for byte, shift in zip(start[6:], (21, 14, 7, 0), strict=False))
        opened.seek(10 + size)
        return opened.read(2048)
