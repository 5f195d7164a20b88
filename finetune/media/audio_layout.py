"""Audio chunking and placeholder counts, computed from the number of samples (no numpy, no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioSpec:
    """Audio settings of a checkpoint.

    Attributes:
        pool_step: outputs of the audio encoder that are pooled to one token.
        run_seconds: seconds of audio per placeholder run; 0 for a single run per clip.
        bins: number of mel bins.
        rate: sampling rate in Hz.
        hop: hop length of the STFT in samples.
        window: window length of the STFT in samples.
        chunk_seconds: maximum input of the audio encoder in seconds; longer clips are split.
    """

    pool_step: int
    run_seconds: float = 0
    bins: int = 80
    rate: int = 16_000
    hop: int = 160
    window: int = 400
    chunk_seconds: int = 30

    @property
    def chunk_samples(self) -> int:
        """Maximum number of samples of a chunk."""
        return self.chunk_seconds * self.rate

    @property
    def shortest(self) -> int:
        """Smallest number of samples that gives a token."""
        return (2 * self.pool_step - 2) * self.hop + 1

    def frames(self, samples: int) -> int:
        """Number of mel frames of a number of samples."""
        return math.ceil(samples / self.hop)

    def tokens(self, frames: int) -> int:
        """Number of tokens of the mel frames of one chunk: convolution with stride 2, then pooling.

        >>> AudioSpec(pool_step=2).tokens(100), AudioSpec(pool_step=5).tokens(3000)
        (25, 300)
        """
        return ((frames - 1) // 2 + 1) // self.pool_step


@dataclass(frozen=True, slots=True)
class AudioPlan:
    """The placeholders of one clip.

    Attributes:
        runs: number of tokens of each placeholder run.
        frames: number of mel frames of each encoder chunk.
    """

    runs: tuple[int, ...]
    frames: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of placeholders of the clip."""
        return sum(self.runs)


Span = tuple[int, int]


def audio_chunks(samples: int, spec: AudioSpec) -> list[Span]:
    """Half-open sample ranges of the encoder chunks; a last chunk too short for a token is dropped.

    >>> audio_chunks(480_000 + 160, AudioSpec(pool_step=2))
    [(0, 480000)]
    >>> audio_chunks(500_000, AudioSpec(pool_step=2))
    [(0, 480000), (480000, 500000)]
    """
    spans = [(start, min(start + spec.chunk_samples, samples)) for start in range(0, samples, spec.chunk_samples)]
    return [(start, end) for start, end in spans if spec.tokens(spec.frames(end - start))]


def plan_audio(samples: int, spec: AudioSpec) -> AudioPlan:
    """The placeholders of a clip by its number of samples.

    >>> plan_audio(16_000 * 65, AudioSpec(pool_step=2)).runs
    (1625,)
    >>> plan_audio(16_000 * 2 + 8_000, AudioSpec(pool_step=2, run_seconds=1.0)).runs
    (25, 25, 12)

    Args:
        samples: number of samples at ``spec.rate``; at least ``spec.shortest``.
        spec: audio settings of the checkpoint.

    Raises:
        ValueError: the clip is too short for a token.
    """
    frames = tuple(spec.frames(end - start) for start, end in audio_chunks(samples, spec))
    total = sum(spec.tokens(count) for count in frames)
    if not total:
        raise ValueError(f"a clip of {samples} samples is too short for a token; {spec.shortest} are needed")
    run = spec.tokens(int(spec.run_seconds * spec.rate / spec.hop)) or total
    return AudioPlan(tuple(min(run, total - start) for start in range(0, total, run)), frames)
