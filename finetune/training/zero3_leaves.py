"""Marks blocks of experts as ZeRO-3 leaf modules."""

from __future__ import annotations

import logging

from torch import nn

from finetune.models.experts import ExpertBlock

logger = logging.getLogger(__name__)


def keep_experts_together(model: nn.Module) -> None:
    """Makes every block of experts a ZeRO-3 leaf module; to be called before DeepSpeed's engine is built.

    Tokens of different ranks are routed to different experts, but all ranks must gather the same weights in the same
    order. The weights of a leaf are gathered together, including adapters on experts, which peft reads without calling
    the modules that hold them.
    """
    if not any(isinstance(module, ExpertBlock) for module in model.modules()):
        return
    from deepspeed.utils import set_z3_leaf_modules

    blocks = set_z3_leaf_modules(model, [ExpertBlock])
    logger.info("ZeRO-3 gathers each of the %d blocks of experts as one leaf module", len(blocks))
