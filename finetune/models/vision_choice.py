"""Chooses the vision tower of a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.vision import VisionTower

if TYPE_CHECKING:
    from finetune.families.family import Network


def build_vision(config: MiniCPMVConfig, network: Network) -> VisionTower:
    """The vision tower that a family names."""
    from finetune.models.vision_navit import NavitSiglip
    from finetune.models.vision_timm import TimmSiglip

    towers: dict[str, Callable[[MiniCPMVConfig, str], VisionTower]] = {
        "timm_siglip": TimmSiglip,
        "navit_siglip": NavitSiglip,
    }
    return towers[network.vision](config, network.positions)
