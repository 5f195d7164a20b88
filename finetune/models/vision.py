"""``VisionTower`` (base class), patch projection and pixel normalisation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.initialization import initialize
from finetune.models.positions import Sizes


class VisionTower(PreTrainedModel):
    """Base class of vision towers: encodes the patches of all items of a micro-batch in one pass.

    A PreTrainedModel, so that ``model.vpm.gradient_checkpointing_enable()`` works. It shares the configuration of the
    full model, and with it the attention implementation.
    """

    config: MiniCPMVConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = MiniCPMVConfig
    main_input_name = "patches"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    output_size: int
    """Width of the features."""

    def forward(self, patches: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Features of the patches.

        Args:
            patches: (N, 3*P*P) uint8, rows in (channel, row, column) order, items concatenated.
            sizes: rows and columns of patches per item.

        Returns:
            (N, output_size).
        """
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module)


class PatchProjection(nn.Conv2d):
    """A patch-embedding convolution on single patches, computed as a matrix product.

    Convolution kernels take several times as long for many small images. Parameters and names are those of the
    convolution, for checkpoints, hooks and adapters.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name of nn.Conv2d
        """(N, C, P, P) to (N, D, 1, 1), P = the kernel's side."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


def normalize(patches: torch.Tensor, side: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes to numbers in [-1, 1]: (N, 3*P*P) uint8 to (N, 3, P, P), P = ``side``; mean and deviation 0.5."""
    # (x / 255 - 0.5) / 0.5 with two roundings, as in the published code: halving and doubling are exact
    return patches.float().div_(127.5).sub_(1).to(dtype).unflatten(1, (3, side, side))
