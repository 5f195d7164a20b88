"""Log-mel features of waveforms, computed by transformers' Whisper feature extractor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from finetune.media.audio_layout import AudioSpec, audio_chunks


def log_mel(samples: np.ndarray, spec: AudioSpec) -> list[torch.Tensor]:
    """Log-mel features of a waveform, one tensor per chunk.

    Args:
        samples: (n,) float32 at ``spec.rate``.
        spec: audio settings of the checkpoint.

    Returns:
        Per chunk (bins, T) float32, T = ``spec.frames`` of its samples. As in the published code, every chunk is padded
        with zeros to its full length before the spectrogram is computed, and the features are truncated afterwards.
    """
    spans = audio_chunks(len(samples), spec)
    if not spans:
        return []
    given = _extractor(spec)(
        [samples[start:end] for start, end in spans], sampling_rate=spec.rate, padding="max_length", return_tensors="pt"
    )
    # Copies, so that the padding is neither kept in memory nor sent from the dataloader worker to the trainer.
    features = zip(given["input_features"], spans, strict=True)
    return [chunk[:, : spec.frames(end - start)].clone() for chunk, (start, end) in features]


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
