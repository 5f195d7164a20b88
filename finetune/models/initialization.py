"""Weight initialisation of vision tower, resampler and projections; the language model has its own."""

from __future__ import annotations

from torch import nn
from transformers import initialization as init

STD = 0.02


def initialize(module: nn.Module) -> None:
    """Initialises the parameters of one basic layer that were not loaded from a checkpoint.

    Sizes are never read from the tensors, which are empty here with ZeRO-3. The functions of transformers skip loaded
    tensors.
    """
    if isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        init.trunc_normal_(module.weight, std=STD)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=STD)
