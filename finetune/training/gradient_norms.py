"""Gradient norm of each part of the model (vision tower, language model, ...), for the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

logger = logging.getLogger(__name__)

PREFIX = "grad_norm_"
# Relative difference between the norms of the parts together and the total norm. Measured: 1e-3 in bf16.
_TOLERANCE = 0.02
# That of torch's and DeepSpeed's clipping: gradients are multiplied by limit / (norm + this) if that is below 1.
_EPSILON = 1e-6


class GradientNormsCallback(TrainerCallback):
    """Measures the L2 norm of the gradients of each part, before clipping, in the steps that are logged.

    A hook of the optimizer reads its gradients when it steps: complete, averaged over the ranks, and clipped, which the
    total norm undoes. DeepSpeed gives its optimizer one group of parameters after another, flattened, and only this
    rank's shard of them. Every group therefore belongs to one part, a norm costs one pass over the local gradients,
    and the ranks exchange one number per part.

    Args:
        accelerator: of the Trainer.
        sharded: whether every rank has a shard of the gradients (ZeRO), and not all of them.
    """

    def __init__(self, accelerator: Accelerator, *, sharded: bool) -> None:
        self._accelerator, self._sharded = accelerator, sharded
        self.parts: Sequence[str] = ()
        """Part of each parameter group of the optimizer."""
        self._part_of: dict[int, str] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self._measuring = False
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the hook; an optimizer with a single part needs none, its norm is the total."""
        optimizer = kwargs["optimizer"]
        while (inner := getattr(optimizer, "optimizer", None)) is not None:  # accelerate and DeepSpeed wrap it
            optimizer = inner
        if len(set(self.parts)) < 2 or len(optimizer.param_groups) != len(self.parts):
            return
        self._part_of = {id(group): part for group, part in zip(optimizer.param_groups, self.parts, strict=True)}
        optimizer.register_step_pre_hook(self._measure)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decides whether this step is measured."""
        step = state.global_step + 1
        by_steps = args.logging_strategy == IntervalStrategy.STEPS and step % max(state.logging_steps, 1) == 0
        first = step == 1 and args.logging_first_step
        self._measuring = by_steps or first or args.logging_strategy == IntervalStrategy.EPOCH
        self._squares = {}

    def _measure(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._measuring:
            return
        for group in optimizer.param_groups:
            found = [weight.grad for weight in group["params"] if weight.grad is not None]
            part = self._part_of.get(id(group))
            if found and part is not None:
                square = get_total_norm(found).float() ** 2
                before = self._squares.get(part)
                self._squares[part] = square if before is None else before + square.to(before.device)

    def log(self, total: float | None, limit: float) -> dict[str, float]:
        """The norms of the last step as ``grad_norm_<part>``; every rank must call it.

        Args:
            total: norm of all gradients before clipping.
            limit: norm to which they were clipped; 0 if they were not.

        Returns:
            Nothing when the step was not applied, or when the parts do not add up to the total.
        """
        if not self._part_of:
            return {}
        parts = list(dict.fromkeys(self.parts))
        own = torch.stack([torch.as_tensor(self._squares.get(part, 0.0), device="cpu") for part in parts])
        self._squares = {}
        if self._sharded:
            summed = self._accelerator.reduce(own.to(self._accelerator.device), reduction="sum")
            assert isinstance(summed, torch.Tensor)
            own = summed
        norms = [math.sqrt(square) for square in own.tolist()]
        if total is None or not math.isfinite(total) or total <= 0 or not any(norms):
            return {}
        factor = max((total + _EPSILON) / limit, 1.0) if limit > 0 else 1.0
        together = factor * math.hypot(*norms)
        if abs(together - total) > _TOLERANCE * total:
            self._warn(together, total)
            return {}
        return {f"{PREFIX}{part}": factor * norm for part, norm in zip(parts, norms, strict=True)}

    def _warn(self, together: float, total: float) -> None:
        if not self._warned and self._accelerator.is_main_process:
            logger.warning(
                "the gradient norms of the parts are not logged: together they are %.4g, the total norm is %.4g; this "
                "optimizer does not get all gradients of the model at its step",
                together, total,
            )  # fmt: skip
        self._warned = True
