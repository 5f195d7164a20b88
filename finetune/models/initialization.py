"""First values of the parts that are ours; the language model brings its own."""

from __future__ import annotations

from torch import nn
from transformers import initialization as init

STD = 0.02


def initialize(module: nn.Module) -> None:
    """Fills the parameters of one plain layer, skipping those that a checkpoint has filled.

    Sizes are never read from the tensors: under ZeRO-3 they are empty here. The functions of transformers are used
    because they leave loaded tensors alone.
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
