"""The training loss, with logits only where a label is."""

from __future__ import annotations

import torch
from torch import nn

from finetune.models.head import nll_of

IGNORE = -100


def supervised_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    num_items: torch.Tensor | int | None,
    *,
    scaling: float = 1.0,
    bounds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross entropy in float32.

    Args:
        hidden: (B, T, E) last hidden states.
        labels: (B, T) unshifted, -100 = no loss. The first of a row or segment counts for nothing.
        head: output layer, (M, E) to (M, V), called once.
        num_items: divisor of the summed loss; None divides by the number of labelled tokens here.
        scaling: what logits are divided by.
        bounds: (s + 1,), where the segments of ONE row begin and end; None for rows that are not packed.

    Returns:
        The loss, and per row the sum of negative log likelihoods and the number of labelled tokens, (B, 2) float32;
        with ``bounds`` per segment, (s, 2). A batch without labels has loss 0, connected to the graph.
    """
    labels = labels.to(hidden.device)
    rows, places, count = _labelled(labels, bounds)
    if bounds is None:
        places = places + rows * labels.shape[1]
    chosen = hidden.flatten(0, 1).index_select(0, places - 1)
    total, nll = nll_of(head, chosen, labels.flatten()[places], scaling)
    per_row = torch.zeros(count, 2, dtype=nll.dtype, device=nll.device)
    per_row.index_add_(0, rows.to(nll.device), torch.stack([nll, torch.ones_like(nll)], dim=1))
    # A batch of nothing but rows without labels is counted as 0 by the Trainer too.
    divisor = torch.as_tensor(len(nll) if num_items is None else num_items, device=nll.device).clamp(min=1)
    return total / divisor, per_row


def _labelled(labels: torch.Tensor, bounds: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Row or segment (M,) and column (M,) of every labelled token, and the number of rows or segments."""
    if bounds is None:
        rows, columns = (labels[:, 1:] != IGNORE).nonzero().unbind(1)
        return rows, columns + 1, len(labels)
    bounds = bounds.to(labels.device)
    labelled = labels[0] != IGNORE
    labelled[bounds[:-1].long()] = False
    places = labelled.nonzero()[:, 0]
    return torch.bucketize(places, bounds[1:], right=True), places, len(bounds) - 1
