"""A plugin of vLLM: MiniCPM-V's classes of 0.32.0 run without a GPU too, where their resampler asks CUDA something."""

from __future__ import annotations


def register() -> None:
    """Answers that no stream is being captured, in every process of vLLM."""
    import torch

    if not torch.cuda.is_available():
        torch.cuda.is_current_stream_capturing = lambda: False
