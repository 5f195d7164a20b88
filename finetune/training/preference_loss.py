"""Losses of preference training: DPO (sigmoid), IPO, hinge, ORPO and SimPO, from log-probabilities of answers.

The formulas are those of TRL 1.16 (``DPOTrainer``; ``CPOTrainer`` for simpo and label smoothing, ``ORPOTrainer``). It
computes them in methods that call the model on batches of its own, so they cannot be called with our log-probabilities;
``tests/training/test_preference_loss.py`` holds their figures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from finetune.arguments.preference import PreferenceOptions

FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "length/chosen",
    "length/rejected",
)
"""Names of the figures of a pair in the log, after its loss; lengths are labelled tokens of the answers."""
# The largest mean log-probability in the odds of orpo: at 0 they would be infinite.
_CERTAIN = -1e-7


class PairFigures(NamedTuple):
    """Loss and figures of B pairs.

    Attributes:
        loss: (B,) float32 with a graph.
        table: (B, 6) float32 without a graph, the columns of FIGURES.
    """

    loss: torch.Tensor
    table: torch.Tensor


def pair_figures(row_loss: torch.Tensor, reference: torch.Tensor | None, options: PreferenceOptions) -> PairFigures:
    """The loss of every pair.

    Args:
        row_loss: (2 B, 2) summed negative log likelihood and number of tokens of every answer, chosen ones first.
        reference: (B, 2) log-probabilities of the chosen and the rejected answer by the reference; None without one.
        options: the flags.

    Raises:
        ValueError: the loss needs a reference and has none.
    """
    logps, tokens = -row_loss[:, 0].view(2, -1), row_loss[:, 1].detach().view(2, -1)
    means = logps / tokens.clamp(min=1)
    if not options.needs_reference:
        loss, rewards = _without_reference(means, options), options.beta * means.detach()
    elif reference is None:
        raise ValueError(f"the loss {options.loss} needs log-probabilities of a reference")
    else:
        ratios = logps - reference.to(logps).T
        loss, rewards = _with_reference(ratios, tokens, options), options.beta * ratios.detach()
    if options.ftx:
        loss = loss - options.ftx * means[0]
    chosen, rejected = rewards
    table = [chosen, rejected, (chosen > rejected).float(), chosen - rejected, *tokens]
    return PairFigures(loss, torch.stack(table, dim=1))


def _with_reference(ratios: torch.Tensor, tokens: torch.Tensor, options: PreferenceOptions) -> torch.Tensor:
    """Losses (B,) of the log-ratios (2, B) of policy and reference."""
    if options.loss == "ipo":  # per token, as its authors confirmed to TRL
        chosen, rejected = ratios / tokens.clamp(min=1)
        return (chosen - rejected - 1 / (2 * options.beta)) ** 2
    margins = options.beta * (ratios[0] - ratios[1])
    if options.loss == "hinge":
        return torch.relu(1 - margins)
    wrong = options.label_smoothing
    return -(1 - wrong) * F.logsigmoid(margins) - wrong * F.logsigmoid(-margins)


def _without_reference(means: torch.Tensor, options: PreferenceOptions) -> torch.Tensor:
    """Losses (B,) of the mean log-probabilities (2, B) per token."""
    if options.loss == "simpo":
        return -F.logsigmoid(options.beta * (means[0] - means[1]) - options.gamma)
    chosen, rejected = means.clamp(max=_CERTAIN)
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -means[0] - options.beta * F.logsigmoid(log_odds)
