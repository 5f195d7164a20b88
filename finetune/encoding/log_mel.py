"""Log-mel features of waveforms, computed by transformers' Whisper feature extractor."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.media.audio_layout import AudioSpec, audio_chunks

if TYPE_CHECKING:
    import torch

# Frames.
_BLOCK = 16


def log_mel(samples: np.ndarray, spec: AudioSpec) -> list[torch.Tensor]:
    """Log-mel features of a waveform, one tensor per chunk.

    Args:
        samples: (n,) float32 at ``spec.rate``.
        spec: audio settings of the checkpoint.

    Returns:
        Per chunk (bins, T) float32, T = ``spec.frames`` of its samples. The published code pads every chunk with zeros
        to ``spec.chunk_samples`` before the spectrogram is computed and truncates the features afterwards; these are
        the same bits (see ``_padded``).
    """
    return [_chunk(samples[start:end], spec) for start, end in audio_chunks(len(samples), spec)]


def _chunk(samples: np.ndarray, spec: AudioSpec) -> torch.Tensor:
    given = _extractor(spec)(
        samples,
        sampling_rate=spec.rate,
        padding="max_length",
        max_length=_padded(len(samples), spec),
        return_tensors="pt",
    )
    # A copy, so that the padding is neither kept in memory nor sent from the dataloader worker to the trainer.
    return given["input_features"][0, :, : spec.frames(len(samples))].clone()


def _padded(samples: int, spec: AudioSpec) -> int:
    """Number of samples a chunk is padded to: all frames that overlap the chunk are in it, as in the full length.

    A frame behind them is silent, which is the least value there is, so that the maximum by which the features are
    clamped is the same. What is reflected at the end of the padding stays behind the last of them. Full blocks of
    frames keep the order in which the matrix product with the mel filters sums, which is another one for few frames.
    """
    block = _BLOCK * spec.hop
    return min(-(-(samples + spec.window + 2 * spec.hop) // block) * block, spec.chunk_samples)


@lru_cache(maxsize=4)
def _extractor(spec: AudioSpec) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(
        feature_size=spec.bins,
        sampling_rate=spec.rate,
        hop_length=spec.hop,
        chunk_length=spec.chunk_seconds,
        n_fft=spec.window,
    )
