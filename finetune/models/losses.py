"""The training loss, with logits only where a label is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

IGNORE = -100


def supervised_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    num_items: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross entropy in float32.

    Args:
        hidden: (B, T, E) last hidden states.
        labels: (B, T) unshifted, -100 = no loss.
        logits_of: (M, E) to (M, V).
        num_items: divisor of the summed loss; None divides by the number of labelled tokens here.

    Returns:
        The loss, and per row the sum of negative log likelihoods and the number of labelled tokens, (B, 2) float32. A
        batch without labels has loss 0, connected to the graph.
    """
    targets = labels[:, 1:].to(hidden.device)
    labelled = targets != IGNORE
    logits = logits_of(hidden[:, :-1][labelled]).float()
    targets, labelled = targets.to(logits.device), labelled.to(logits.device)
    nll = F.cross_entropy(logits, targets[labelled], reduction="none")
    counts = labelled.sum(dim=1)
    sums = torch.zeros(len(counts), dtype=nll.dtype, device=nll.device)
    sums = sums.index_add(0, labelled.nonzero()[:, 0], nll.detach())
    # A batch of nothing but rows without labels is counted as 0 by the Trainer too.
    divisor = (counts.sum() if num_items is None else torch.as_tensor(num_items, device=nll.device)).clamp(min=1)
    return nll.sum() / divisor, torch.stack([sums, counts.to(sums.dtype)], dim=1)
