"""Checks the initial loss: near ln(vocabulary) the base weights are not pretrained, and the run stops."""

from __future__ import annotations

import logging
import math

from torch import nn

from finetune.training.freezing import counted, numel
from finetune.utils.errors import UserError

logger = logging.getLogger(__name__)

# A pretrained checkpoint predicts far better than chance: a loss near ln(vocabulary) means wrong weights.
CHANCE = 0.85
# Parameters. Every published checkpoint is larger; smaller ones have random weights on purpose (demo, tests).
SMALLEST_PRETRAINED = 100_000_000


class BaseLossError(UserError):
    """The checkpoint predicts no better than chance before the first update."""


def check_base_loss(loss: float, vocab_size: int, model: nn.Module, name: str) -> None:
    """Checks that a pretrained checkpoint predicts better than chance.

    Args:
        loss: of the first micro-batch, per token, over all ranks.
        vocab_size: entries of the tokenizer's vocabulary.
        model: the model; one that is smaller than any published checkpoint may be random.
        name: of the checkpoint, for the message.

    Raises:
        BaseLossError: it does not.
    """
    chance = math.log(vocab_size)
    if loss <= CHANCE * chance:
        return
    if sum(numel(weight) for _, weight in counted(model)) <= SMALLEST_PRETRAINED:
        logger.info(
            "that is no better than chance: right for a tiny model with random weights, wrong for a trained one"
        )
    else:
        raise BaseLossError(
            f"the base loss {loss:.2f} is near ln(vocabulary) = {chance:.2f}: {name} predicts no better than chance. "
            "Its weights are probably not those of its config.json (a truncated download, a folder of random weights), "
            "or its tokenizer belongs to another model. Pass --check_base_loss off if random weights are intended"
        )
