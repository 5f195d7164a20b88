"""Decodes audio files (and audio tracks of videos) to mono float32 waveforms at 16 kHz, with PyAV."""

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

from finetune.sample import DataError, Media, Track
from finetune.utils.errors import UserError
from finetune.utils.file_types import told
from finetune.utils.quoting import reason

SAMPLING_RATE = 16_000
"""Sampling rate of every waveform, in Hz."""
MAX_CHANNELS = 8
"""Maximum number of channels (7.1). Files with more are refused by their header: FFmpeg may crash on them."""
ACCEPTED_SAMPLING_RATES = (1_000, 768_000)
"""Lowest and highest sampling rate that is read, in Hz. FFmpeg's filter for much higher ones, which only a
damaged header has, takes a minute to build."""
MAX_SECONDS = 1800
"""Longest clip that is decoded; at 10 to 25 tokens per second it exceeds any context length."""

# Allowed containers. Playlists and patterns are excluded: they refer to other files or URLs.
_OPTIONS = {
    "format_whitelist": "wav,w64,aiff,au,caf,flac,mp3,ogg,opus,aac,ac3,eac3,amr,amrnb,amrwb,ape,wv,tta,"
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf",
    "protocol_whitelist": "file",
}
# Decoded clips in the cache: a sample is measured first, then encoded.
_KEPT = 8
# Containers with a reliable duration in their header; elsewhere it is estimated or missing.
_HAS_DURATION = {"flac", "mov", "mp4", "m4a", "matroska", "webm"}
# Containers with a size in bytes in their header, and the smallest placeholder value of writers to a pipe.
_HAS_SIZE, _UNKNOWN = {"wav", "aiff"}, 0x7FFF0000
# Tolerance in seconds at the end: codecs add or remove a few samples.
_SLACK = 0.25


class _UnusableError(Exception):
    """Why a file cannot be used; the caller adds file and record."""


def load(media: Media) -> np.ndarray:
    """The waveform of a clip, (samples,) float32 at 16 kHz, about -1 to 1; of a video file its first audio track.

    Other rates are resampled by FFmpeg's swresample with its default filter; channels are averaged. The array is
    cached: do not modify it.

    Raises:
        DataError: no such file, not audio, no audio track, truncated or damaged, or longer than MAX_SECONDS.
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
        if isinstance(media.data, Track):
            return _mixed(media.data)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{media} does not exist; correct the path or remove the record") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{media} cannot be read ({reason(error)}); replace it or remove the record") from error
    except _UnusableError as error:
        known = told(media.data) if isinstance(media.data, (Path, bytes)) else None
        raise DataError(f"{media} {known or error}") from error
    raise DataError(f"{media} is not audio; give the path of an audio file or a waveform at 16 kHz")


def av() -> Any:
    """The PyAV module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("av")  # an extra
    except ImportError as error:
        raise UserError(f'audio is decoded by PyAV ({error}); install it: pip install "av>=14,<19"') from error


@lru_cache(maxsize=_KEPT)
def _of_file(path: Path, size: int, *_: int) -> np.ndarray:
    """The waveform of a file; the other arguments identify its state for the cache."""
    if path.is_dir():
        raise _UnusableError("is a folder; give the path of an audio file")
    if not size:
        raise _UnusableError("is empty (0 bytes); replace it or remove the record")
    return _decode(path)


def _mixed(track: Track) -> np.ndarray:
    """The waveform of a full-duplex record: whole seconds, its clips added to silence."""
    waves = [(start, load(clip)) for start, clip in track.clips]
    for (_, clip), (_, wave), stated in zip(track.clips, waves, track.samples, strict=False):
        if len(wave) != stated:
            raise DataError(
                f"{clip} has {len(wave)} samples at 16 kHz, and the record says {stated} (duration_sec); give the "
                "file that the record describes, at 16 kHz, or correct the duration"
            )
    end = max(start + len(wave) for start, wave in waves)
    samples = track.seconds * SAMPLING_RATE
    if track.fixed and end > samples:
        raise DataError(
            f"its user audio ends after {end / SAMPLING_RATE:.2f} seconds, and 'seconds' is {track.seconds}; raise "
            "'seconds' or remove it"
        )
    mixed = np.zeros(max(samples, -(-end // SAMPLING_RATE) * SAMPLING_RATE), np.float32)
    if len(mixed) > MAX_SECONDS * SAMPLING_RATE:
        raise _UnusableError(_too_long())
    for start, wave in waves:
        mixed[start : start + len(wave)] += wave
    return mixed


def _given(samples: np.ndarray) -> np.ndarray:
    """Checks a waveform that the caller decoded."""
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise _UnusableError(
            f"has shape {samples.shape} and dtype {samples.dtype}; give a mono float waveform at 16 kHz, as from "
            "librosa.load(path, sr=16000, mono=True)"
        )
    return _checked(samples.astype(np.float32, copy=False))


def _decode(file: Path | bytes) -> np.ndarray:
    """The waveform of a file, or of the bytes of one."""
    chunks, total, end, short = [], 0, 0.0, False
    with _opened(str(file) if isinstance(file, Path) else io.BytesIO(file)) as (container, stream):
        # Channels are averaged below, since swresample would sum them. The format is interleaved, because PyAV fails
        # on planar audio with 8 or more channels.
        resampler = av().AudioResampler(format="flt", rate=SAMPLING_RATE)
        for packet in chain(container.demux(stream), [None]):
            short |= packet is not None and packet.is_corrupt
            # None after the last packet flushes the resampler.
            for frame in [None] if packet is None else packet.decode():
                if frame is not None:
                    _check_rate(frame.sample_rate)
                    end = max(end, (frame.time or 0.0) + frame.samples / frame.sample_rate)
                    frame.pts = None  # gaps and jumps in time are not filled
                for resampled in resampler.resample(frame):
                    planes = resampled.to_ndarray().reshape(resampled.samples, -1).T
                    chunks.append(np.ascontiguousarray(planes).mean(axis=0))
                    total += len(chunks[-1])
            if total > MAX_SECONDS * SAMPLING_RATE:
                raise _UnusableError(_too_long())
        expected = _expected_end(file, container, stream)
    if (expected is not None and end < expected - _SLACK) or (short and _has_size(file, container)):
        length = "" if expected is None or end >= expected else f" of {expected:.2f}"
        raise _UnusableError(
            f"is truncated: it ends after {end:.2f}{length} seconds, before the end given in its header; replace it or "
            "remove the record"
        )
    return _checked(np.concatenate(chunks) if chunks else np.zeros(0, np.float32))


def _checked(samples: np.ndarray) -> np.ndarray:
    if not len(samples):
        raise _UnusableError("has no audio in it (0 samples); replace it or remove the record")
    if len(samples) > MAX_SECONDS * SAMPLING_RATE:
        raise _UnusableError(_too_long())
    if not np.isfinite(samples).all():
        raise _UnusableError("has samples that are not finite (NaN or infinity); replace it or remove the record")
    return samples


def _too_long() -> str:
    return f"is longer than {MAX_SECONDS} seconds; cut it into shorter clips, each with its own question"


@contextmanager
def _opened(file: str | io.BytesIO) -> Iterator[tuple[Any, Any]]:
    """The container and its first audio track; decoding errors inside become _UnusableError."""
    library = av()
    _check_channels(_channels(_head(file if isinstance(file, str) else file.getvalue())))
    try:
        # Invalid text in the metadata does not matter.
        with library.open(file, metadata_errors="ignore", options=_OPTIONS) as container:
            if not container.streams.audio:
                raise _UnusableError("has no audio track; give a file with audio, or remove it from the record")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise _UnusableError("has audio in a codec that FFmpeg does not support; save it as WAV")
            _check_channels(stream.codec_context.channels)
            _check_rate(stream.codec_context.sample_rate)
            yield container, stream
    except (library.FFmpegError, ValueError, EOFError, IndexError) as error:
        raise _UnusableError(
            f"cannot be decoded as audio ({error}); the file is not audio, truncated or damaged: save it as WAV, "
            "replace it or remove the record"
        ) from error


def _expected_end(file: Path | bytes, container: Any, stream: Any) -> float | None:
    """The end of the audio track in seconds by the header; None where the header is not reliable."""
    names = set(container.format.name.split(","))
    if not (_HAS_DURATION & names or ("mp3" in names and _mp3_has_length(_head(file)))):
        return None
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration is not None:
        return start + float(stream.duration * stream.time_base)
    # With a video track the container's duration may be that of the video.
    return None if container.streams.video or not container.duration else container.duration / 1_000_000


def _mp3_has_length(head: bytes) -> bool:
    """Whether the first MP3 frame has the number of frames."""
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def _has_size(file: Path | bytes, container: Any) -> bool:
    """Whether the header has a valid size in bytes; a file written to a pipe has not."""
    size = _head(file)[4:8]
    order = "big" if container.format.name == "aiff" else "little"
    return container.format.name in _HAS_SIZE and 0 < int.from_bytes(size, order) < _UNKNOWN


def _check_channels(count: int | None) -> None:
    if count is not None and count > MAX_CHANNELS:
        raise _UnusableError(f"has {count} channels, and at most {MAX_CHANNELS} are read; mix it down to one or two")


def _check_rate(rate: int) -> None:
    """Some decoders know the rate of their stream only from its first frame; until then it is 0."""
    low, high = ACCEPTED_SAMPLING_RATES
    if rate and not low <= rate <= high:
        raise _UnusableError(
            f"has a sampling rate of {rate} Hz, and {low} to {high} Hz are read: its header is damaged; save it "
            "again as WAV, replace it or remove the record"
        )


def _channels(head: bytes) -> int | None:
    """Number of channels by the header of WAV, W64, AIFF, AU and CAF files; None for other formats."""
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
    """The integer ``at`` bytes after the name of a chunk; None if the chunk is not near the start of the file."""
    start = head.find(chunk, 8 if chunk == b"desc" else 12)
    value = head[start + at : start + at + size]
    return int.from_bytes(value, order) if start >= 0 and len(value) == size else None


def _head(file: Path | str | bytes) -> bytes:
    """The first bytes, after the ID3 tags of an MP3."""
    with io.BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb") as opened:
        start = opened.read(10)
        if start[:3] != b"ID3":
            return start + opened.read(2048)
        # ID3 sizes have seven bits per byte.
        size = sum(byte << shift for byte, shift in zip(start[6:], (21, 14, 7, 0), strict=False))
        opened.seek(10 + size)
        return opened.read(2048)
