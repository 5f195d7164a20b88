"""Names of tiny checkpoints: the families that transformers has, and those that exist with another network too."""

from __future__ import annotations

from finetune.families import by_name, usable
from finetune.families.family import Family

MIXTURE = "v4_7_moe"
"""4.7 with four routed experts per layer, two of which see a token, and a shared one."""

NAMES = tuple(family.name for family in usable())
VARIANTS = (*NAMES, MIXTURE)


def family_name(variant: str) -> str:
    """The family that a checkpoint belongs to."""
    return variant.removesuffix("_moe")


def family_of(variant: str) -> Family:
    """The same as values."""
    return by_name(family_name(variant))


def experts_of(variant: str) -> int:
    """Routed experts per layer, 0 for a dense network."""
    return 4 if variant == MIXTURE else 0
