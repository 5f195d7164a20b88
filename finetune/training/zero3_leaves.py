"""What ZeRO-3 must gather in one piece."""

from __future__ import annotations

import logging

from torch import nn

from finetune.models.experts import ExpertBlock

logger = logging.getLogger(__name__)


def keep_experts_together(model: nn.Module) -> None:
    """Makes every block of experts one leaf for ZeRO-3, before its engine is built.

    Ranks send their tokens to other experts, but must gather the same weights in the same order. A leaf's are gathered
    on entering it, those of adapters on experts too, which peft reads without calling the modules that they lie in.
    """
    if not any(isinstance(module, ExpertBlock) for module in model.modules()):
        return
    from deepspeed.utils import set_z3_leaf_modules

    blocks = set_z3_leaf_modules(model, [ExpertBlock])
    logger.info("ZeRO-3 gathers each of the %d blocks of experts in one piece", len(blocks))
