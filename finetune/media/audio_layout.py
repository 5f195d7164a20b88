"""Where sound is cut and how many placeholders it takes: integers in, integers out (no samples, no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioSpec:
    """How a checkpoint hears.

    Attributes:
        pool_step: outputs of the encoder that become one token.
        run_seconds: seconds of sound per run of placeholders; 0 gives every clip a single run.
        bins: mel bins.
        rate: samples per second.
        hop: samples per mel frame.
        window: samples that a mel frame looks at.
        chunk_seconds: most seconds that the encoder takes at once.
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
        """Most samples that the encoder takes at once."""
        return self.chunk_seconds * self.rate

    @property
    def shortest(self) -> int:
        """Fewest samples that make a token."""
        return (2 * self.pool_step - 2) * self.hop + 1

    def frames(self, samples: int) -> int:
        """Mel frames of so many samples."""
        return math.ceil(samples / self.hop)

    def tokens(self, frames: int) -> int:
        """Tokens of so many mel frames, at most one piece: the second convolution halves them, pooling does the rest.

        >>> AudioSpec(pool_step=2).tokens(100), AudioSpec(pool_step=5).tokens(3000)
        (25, 300)
        """
        return ((frames - 1) // 2 + 1) // self.pool_step


@dataclass(frozen=True, slots=True)
class AudioPlan:
    """The placeholders of one clip.

    Attributes:
        runs: tokens of each run; one run, or several where the clip is chunked.
        frames: mel frames of each piece that the encoder takes.
    """

    runs: tuple[int, ...]
    frames: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Placeholders of the whole clip."""
        return sum(self.runs)


Span = tuple[int, int]


def audio_chunks(samples: int, spec: AudioSpec) -> list[Span]:
    """Half-open ranges of samples that the encoder takes one by one; an end too short for a token is left out.

    >>> audio_chunks(480_000 + 160, AudioSpec(pool_step=2))
    [(0, 480000)]
    >>> audio_chunks(500_000, AudioSpec(pool_step=2))
    [(0, 480000), (480000, 500000)]
    """
    spans = [(start, min(start + spec.chunk_samples, samples)) for start in range(0, samples, spec.chunk_samples)]
    return [(start, end) for start, end in spans if spec.tokens(spec.frames(end - start))]


def plan_audio(samples: int, spec: AudioSpec) -> AudioPlan:
    """The placeholders of a clip.

    >>> plan_audio(16_000 * 65, AudioSpec(pool_step=2)).runs
    (1625,)
    >>> plan_audio(16_000 * 2 + 8_000, AudioSpec(pool_step=2, run_seconds=1.0)).runs
    (25, 25, 12)

    Args:
        samples: at the rate of the settings; at least ``spec.shortest``.
        spec: settings of the checkpoint.

    Raises:
        ValueError: the clip is too short for a token.
    """
    frames = tuple(spec.frames(end - start) for start, end in audio_chunks(samples, spec))
    total = sum(spec.tokens(count) for count in frames)
    if not total:
        raise ValueError(f"a clip of {samples} samples makes no token; {spec.shortest} are needed")
    run = spec.tokens(int(spec.run_seconds * spec.rate / spec.hop)) or total
    return AudioPlan(tuple(min(run, total - start) for start in range(0, total, run)), frames)
