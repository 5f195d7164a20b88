"""What the vision towers share, and the table of towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.initialization import initialize
from finetune.models.positions import Sizes

if TYPE_CHECKING:
    from finetune.families.family import Network


class VisionTower(PreTrainedModel):
    """Patches of all items of a micro-batch in, features out, in one pass.

    A PreTrainedModel so that ``model.vpm.gradient_checkpointing_enable()`` works on it alone. It shares the
    configuration of the whole model, and with it the attention implementation.
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
            patches: (N, 3*P*P) uint8, rows in (channel, row, column) order, items one behind another.
            sizes: rows and columns of patches per item.

        Returns:
            (N, output_size).
        """
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module)


class PatchProjection(nn.Conv2d):
    """A convolution of images that are one kernel large, as the matrix product that it is.

    The libraries' convolutions take several times as long for many small images. Parameters, names and module stay
    those of the convolution, for checkpoints, hooks and adapters.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name of nn.Conv2d
        """(N, C, P, P) to (N, D, 1, 1), P = the kernel's side."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


def normalize(patches: torch.Tensor, side: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes to numbers in [-1, 1]: (N, 3*P*P) uint8 to (N, 3, P, P), P = ``side``; mean and deviation 0.5."""
    # (x / 255 - 0.5) / 0.5 with two roundings, as there: halving and doubling are exact
    return patches.float().div_(127.5).sub_(1).to(dtype).unflatten(1, (3, side, side))


def build_vision(config: MiniCPMVConfig, network: Network) -> VisionTower:
    """The vision tower that a family names."""
    from finetune.models.vision_navit import NavitSiglip
    from finetune.models.vision_timm import TimmSiglip

    towers: dict[str, Callable[[MiniCPMVConfig, str], VisionTower]] = {
        "timm_siglip": TimmSiglip,
        "navit_siglip": NavitSiglip,
    }
    return towers[network.vision](config, network.positions)
