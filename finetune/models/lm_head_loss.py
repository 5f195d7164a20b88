"""Cross entropy inside the output layer: logits of labelled tokens only, in chunks, with gradients in the forward pass.

With ZeRO-3 the weight is gathered only while the layer is called, so the whole loss is computed in that call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# Bytes of the float32 logits and log probabilities of a chunk.
BUDGET = 96 * 2**20
IGNORE = -100
# From this many numbers of hidden states on, a product from the side of the weight is no faster.
_NARROW = 2**13
_LOW = (torch.bfloat16, torch.float16)


class LMHeadLoss(nn.Linear):
    """An output layer that returns the loss instead of logits if it is called with targets.

    Args:
        linear: the layer that it replaces, without a bias; the parameter is shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super(nn.Linear, self).__init__()  # Linear's would make a new parameter
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)

    def forward(
        self,
        input: torch.Tensor,
        targets: torch.Tensor | None = None,
        scaling: float = 1.0,
        *,
        by_token: bool = False,
        factors: torch.Tensor | None = None,
    ) -> Any:
        """Logits (..., V) of hidden states (..., E); with targets (M,) the loss of (M, E).

        That is ``linear_nll``, with the ``factors`` of the tokens, or with ``by_token`` ``token_nll``.
        """
        if targets is None:
            return weight_times(self.weight, input) if _is_narrow(self.weight, input) else super().forward(input)
        if by_token:
            return token_nll(input, self.weight, targets, scaling)
        return linear_nll(input, self.weight, targets, scaling, factors=factors)


def _is_narrow(weight: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether ``weight_times`` is faster than a linear layer: a decoding step of a small batch in float32 on a CPU.

    Measured with MKL on an AMD processor and vocabularies of 50,000 and 150,000: 1.4 times as fast for 8 rows of 128,
    2.6 times for 2 rows of 1024, 1.6 times for 2 rows of 3584; as fast at the bound. For one row both are the same.
    """
    rows = hidden.numel() // hidden.shape[-1]
    on_cpu = weight.device.type == hidden.device.type == "cpu"
    whole = weight.dtype == hidden.dtype == _computed_in(weight) == torch.float32
    return on_cpu and whole and not torch.is_grad_enabled() and 2 <= rows <= 8 and hidden.numel() < _NARROW


def weight_times(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """As ``F.linear(hidden, weight)``, the product taken from the side of the weight, which is the larger one.

    Args:
        weight: (V, E).
        hidden: (..., E).

    Returns:
        (..., V), a view of (V, rows).
    """
    return (weight @ hidden.flatten(0, -2).T).T.unflatten(0, hidden.shape[:-1])


def put_head(owner: Any) -> None:
    """Replaces the ``lm_head`` of a model by a ``LMHeadLoss`` if it is an ``nn.Linear`` without bias."""
    old = owner.lm_head
    if type(old) is nn.Linear and old.bias is None:
        owner.lm_head = LMHeadLoss(old)


def nll_of(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scaling: float,
    *,
    by_token: bool = False,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihoods by one call of an output layer: a ``LMHeadLoss`` or a replacement (adapters, 4 bit).

    Args:
        head: (M, E) to (M, V).
        hidden: (M, E).
        targets: (M,) int64.
        scaling: what logits are divided by.
        by_token: give each of them a graph, and their sum none.
        factors: (M,) float32, what each is multiplied with in the sum; None for 1.

    Returns:
        Their sum, and each of them without its factor, (M,) float32 without a graph.
    """
    if isinstance(head, LMHeadLoss) and not by_token:
        return head(hidden, targets, scaling, factors=factors)
    if isinstance(head, LMHeadLoss):
        nll = head(hidden, targets, scaling, by_token=True)
    else:
        logits = (head(hidden) / scaling).float()
        nll = F.cross_entropy(logits, targets.to(logits.device), reduction="none")
    if by_token:
        return nll.detach().sum(), nll
    return (nll if factors is None else nll * factors).sum(), nll.detach()


def linear_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scaling: float = 1.0,
    rows: int | None = None,
    *,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihoods of a linear layer in float32, computed in chunks of at most ``rows`` tokens.

    Args:
        hidden: (M, E); M may be 0.
        weight: (V, E).
        targets: (M,) int64.
        scaling: what logits are divided by.
        rows: tokens per chunk; None for ``rows_at_once``.
        factors: (M,) float32, what each is multiplied with in the sum; None for 1.

    Returns:
        Their sum, with a graph for one backward pass, and each of them without its factor, (M,) float32 without one.
    """
    rows = rows or rows_at_once(len(hidden), weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearNll.apply(hidden, weight, targets, scaling, rows, factors)  # pyright: ignore[reportReturnType]
    nll, _, _ = _by_chunks(hidden, weight, targets, scaling, rows, (False, False))
    return _sum(nll, factors), nll


def _sum(nll: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    return nll.sum() if factors is None else (nll * factors).sum()


def token_nll(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scaling: float = 1.0, rows: int | None = None
) -> torch.Tensor:
    """As ``linear_nll``, for losses in which tokens have different weights: (M,) float32, each with a graph.

    The gradient of the hidden states is scaled in the backward pass; that of a trained weight is computed there, from
    logits that are computed again.
    """
    rows = rows or rows_at_once(len(hidden), weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _TokenNll.apply(hidden, weight, targets, scaling, rows)  # pyright: ignore[reportReturnType]
    return _by_chunks(hidden, weight, targets, scaling, rows, (False, False))[0]


def rows_at_once(count: int, weight: torch.Tensor) -> int:
    """Tokens per chunk for ``count`` tokens: as many as ``BUDGET`` allows, at least one.

    With several chunks, the gradient of a trained 16 bit weight (V, E) is accumulated in float32. If all logits take
    less memory than that sum, one chunk is used.
    """
    vocabulary, width = weight.shape
    if weight.requires_grad and weight.dtype in _LOW and count <= width // 2:
        return max(count, 1)
    return max(BUDGET // (8 * vocabulary), 1)


class _LinearNll(torch.autograd.Function):
    """As ``linear_nll``; gradients of the sum are computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        scaling: float,
        rows: int,
        factors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[:2]
        nll, *gradients = _by_chunks(hidden, weight, targets, scaling, rows, wanted, factors=factors)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(nll)
        ctx.dtype = weight.dtype
        return _sum(nll, factors), nll

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        # In place, as they may be large; torch then refuses a second backward pass, as for any freed graph.
        hidden, weight = (None if tensor is None else tensor.mul_(outputs[0]) for tensor in ctx.saved_tensors)
        return hidden, None if weight is None else weight.to(ctx.dtype), None, None, None, None


class _TokenNll(torch.autograd.Function):
    """As ``token_nll``; the gradient of a trained weight needs the logits once more."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scaling: float, rows: int
    ) -> torch.Tensor:
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        nll, slopes, _ = _by_chunks(hidden, weight, targets, scaling, rows, (of_hidden, False))
        ctx.save_for_backward(slopes, *((hidden, weight, targets) if of_weight else ()))
        ctx.scaling, ctx.rows, ctx.computed_in = scaling, rows, _computed_in(weight)
        return nll

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        factors = outputs[0]
        slopes, *rest = ctx.saved_tensors
        of_hidden = None if slopes is None else (slopes * factors[:, None]).to(slopes.dtype)
        of_weight = None
        if rest:
            hidden, weight, targets = rest
            cast = weight.to(ctx.computed_in)
            options = (ctx.scaling, ctx.rows, (False, True))
            of_weight = _by_chunks(hidden, cast, targets, *options, factors=factors)[2]
            assert of_weight is not None
            of_weight = of_weight.to(weight.dtype)
        return of_hidden, of_weight, None, None, None


def _by_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scaling: float,
    rows: int,
    wanted: Any,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Negative log likelihoods (M,), and the wanted gradients of their sum: of hidden states and of the weight.

    With ``factors`` (M,) the gradients are those of the sum of the products.
    """
    cast = weight.to(_computed_in(weight))
    nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = None
    if wanted[1]:  # accumulating chunks in 16 bit would lose precision
        summed = torch.float32 if len(hidden) > rows else weight.dtype
        of_weight = torch.zeros(weight.shape, dtype=summed, device=weight.device)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        chunk, column = hidden[part].to(cast.dtype), targets[part, None]
        scores = F.linear(chunk, cast)
        scores = F.log_softmax(scores if scaling == 1 else scores.float() / scaling, dim=-1, dtype=torch.float32)
        nll[part] = -scores.gather(1, column)[:, 0]
        if not any(wanted):
            continue
        slopes = scores.exp_().scatter_add_(1, column, torch.full_like(column, -1, dtype=torch.float32))
        slopes = slopes if scaling == 1 else slopes.div_(scaling)
        slopes = (slopes if factors is None else slopes.mul_(factors[part, None])).to(cast.dtype)
        if of_hidden is not None:
            of_hidden[part] = slopes @ cast
        if of_weight is not None:
            _add_product(of_weight, slopes, chunk)
    if of_weight is not None and weight.dtype == torch.bfloat16:  # float16 could overflow before loss scaling
        of_weight = of_weight.bfloat16()
    return nll, of_hidden, of_weight


def _computed_in(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes: that of autocast, else of its weight."""
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _add_product(total: torch.Tensor, slopes: torch.Tensor, chunk: torch.Tensor) -> None:
    """Adds slopes (m, V) transposed times chunk (m, E) to (V, E)."""
    if total.dtype == chunk.dtype:
        total.addmm_(slopes.T, chunk)
    else:
        total += slopes.T @ chunk


def supervised_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    num_items: torch.Tensor | int | None,
    *,
    scaling: float = 1.0,
    bounds: torch.Tensor | None = None,
    row_graph: bool = False,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross entropy in float32.

    Args:
        hidden: (B, T, E) last hidden states.
        labels: (B, T) unshifted, -100 = no loss. The first label of a row or segment is ignored.
        head: output layer, (M, E) to (M, V), called once.
        num_items: divisor of the summed loss; None divides by the number of labelled tokens here.
        scaling: what logits are divided by.
        bounds: (s + 1,) boundaries of the segments of ONE packed row; None for rows that are not packed.
        row_graph: give the sums per row a graph, and the loss none.
        weights: (B, T) float32, weight of every label in the loss; None for 1. The divisor stays the number of labels.

    Returns:
        The loss, and per row the sum of unweighted negative log likelihoods and the number of labelled tokens, (B, 2)
        float32; with ``bounds`` per segment, (s, 2). A batch without labels has loss 0, connected to the graph.
    """
    labels = labels.to(hidden.device)
    rows, places, count = _labelled(labels, bounds)
    if bounds is None:
        places = places + rows * labels.shape[1]
    chosen = hidden.flatten(0, 1).index_select(0, places - 1)
    factors = None if weights is None else weights.to(labels.device).flatten()[places]
    total, nll = nll_of(head, chosen, labels.flatten()[places], scaling, by_token=row_graph, factors=factors)
    per_row = torch.zeros(count, 2, dtype=nll.dtype, device=nll.device)
    per_row = per_row.index_add(0, rows.to(nll.device), torch.stack([nll, torch.ones_like(nll)], dim=1))
    # The Trainer's count is 0 as well for a batch without labels.
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
