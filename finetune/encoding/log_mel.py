"""Waveforms to what the audio tower takes: log-mel frames, by the published feature extractor."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from finetune.media.audio_layout import AudioSpec, pieces


def log_mel(samples: np.ndarray, spec: AudioSpec) -> list[torch.Tensor]:
    """Log-mel frames of a waveform, piece by piece.

    Args:
        samples: (n,) float32 at ``spec.rate``.
        spec: settings of the checkpoint.

    Returns:
        Per piece (bins, T) float32, T = ``spec.frames`` of its samples. As published, every piece is filled up with
        silence before its spectrum is taken, and cut back afterwards.
    """
    spans = pieces(len(samples), spec)
    if not spans:
        return []
    given = _extractor(spec)(
        [samples[start:end] for start, end in spans], sampling_rate=spec.rate, padding="max_length", return_tensors="pt"
    )
    # Copies, so that the silence behind them is not kept, nor sent from loader to trainer.
    features = zip(given["input_features"], spans, strict=True)
    return [piece[:, : spec.frames(end - start)].clone() for piece, (start, end) in features]


@lru_cache(maxsize=4)
def _extractor(spec: AudioSpec) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(
        feature_size=spec.bins,
        sampling_rate=spec.rate,
        hop_length=spec.hop,
        chunk_length=spec.piece_seconds,
        n_fft=spec.window,
    )
