"""Small sound files made for tests: a tone of a given length."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CODECS = {".flac": "flac", ".mp3": "libmp3lame", ".ogg": "libopus", ".m4a": "aac", ".webm": "libopus"}


def tone(seconds: float, rate: int = 16_000, pitch: float = 440.0) -> np.ndarray:
    """Samples of a sine of amplitude 0.4, float32."""
    return (0.4 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, seconds: float, *, rate: int = 16_000, channels: int = 1, pitch: float = 440.0) -> Path:
    """A tone in every channel as 16 bit PCM."""
    return write_samples(path, tone(seconds, rate, pitch), rate=rate, channels=channels)


def write_samples(path: Path, samples: np.ndarray, *, rate: int = 16_000, channels: int = 1) -> Path:
    """Samples from -1 to 1 in every channel as 16 bit PCM."""
    whole = np.round(samples * 32768).clip(-32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(whole[:, None], channels, axis=1).tobytes())
    return path


def write_coded(path: Path, seconds: float, *, rate: int = 48_000) -> Path:
    """A tone in two channels, coded as the ending of the path says."""
    planes = np.repeat(tone(seconds, rate)[None], 2, axis=0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=rate, layout="stereo")
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        size = stream.codec_context.frame_size or None
        resampler = av.AudioResampler(stream.codec_context.format, "stereo", rate, frame_size=size)
        for piece in (*resampler.resample(frame), *resampler.resample(None), None):
            container.mux(stream.encode(piece))
    return path
