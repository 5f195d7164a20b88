"""The flags that say which samples are trained together."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune.errors import ArgumentError

if TYPE_CHECKING:
    from finetune.arguments import TrainingArguments

logger = logging.getLogger(__name__)

PACKINGS = {"off": "off", "batch": "batch", "best_fit": "best_fit", "true": "best_fit", "false": "off"}
BY_SIZE = ("group_by_length", "batch_rebalance")
"""Values of train_sampling_strategy that look at the sizes of the samples."""


@dataclass
class BatchArguments:
    """Which samples are trained together; part of the training flags."""

    packing: str = field(
        default="off",
        metadata={
            "help": "Samples lie one behind another in one row, without padding and without seeing each other. batch: "
            "every optimizer step has the samples it would have anyway, dealt to the GPUs by their work. best_fit: "
            "rows are filled up to packing_tokens, so a step has more samples. off: rows are padded. "
            "true and false mean best_fit and off."
        },
    )
    packing_tokens: int | None = field(
        default=None,
        metadata={"help": "Longest packed row. Default: per_device_train_batch_size x model_max_length."},
    )
    packing_items: int | None = field(
        default=None,
        metadata={"help": "Most images, slices and frames of a row of best_fit. Default: as many as its tokens allow."},
    )


def resolve_batches(training: TrainingArguments) -> None:
    """Defaults that depend on other flags, and a word about flags without effect.

    Raises:
        ArgumentError: flags that contradict each other.
    """
    if (packing := PACKINGS.get(training.packing.lower())) is None:
        raise ArgumentError(f"--packing {training.packing}: off, batch or best_fit")
    training.packing = packing
    if training.dataloader_persistent_workers is None:
        training.dataloader_persistent_workers = training.dataloader_num_workers > 0
    if idle := _idle(training):
        logger.warning("--%s: no effect with --packing %s", ", --".join(idle), training.packing)
    if training.packing == "off":
        return
    orders = ("random", "sequential") if training.packing == "batch" else ("random",)
    if training.train_sampling_strategy not in orders:
        raise ArgumentError(
            f"--packing {training.packing} with --train_sampling_strategy {training.train_sampling_strategy}: packs "
            f"have an order of their own, balanced over the GPUs; use {' or '.join(orders)}"
        )
    if training.packing_tokens is not None and training.packing_tokens < training.model_max_length:
        logger.warning(
            "--packing_tokens %d is below --model_max_length %d: a sample between them has a row of its own",
            training.packing_tokens,
            training.model_max_length,
        )


def row_capacity(training: TrainingArguments) -> int:
    """Most tokens of a packed row."""
    return training.packing_tokens or training.per_device_train_batch_size * training.model_max_length


def _idle(training: TrainingArguments) -> list[str]:
    """Flags that were given and mean nothing with this kind of packing."""
    if training.packing == "off":
        return [name for name in ("packing_tokens", "packing_items") if getattr(training, name) is not None]
    idle = ["dataloader_drop_last"] if training.dataloader_drop_last else []
    if training.packing == "batch" and training.packing_items is not None:
        idle.append("packing_items")
    return idle


def check_streamed_batches(training: TrainingArguments) -> None:
    """Checks that batches do not need the sizes of records that are still to come.

    Raises:
        ArgumentError: they do.
    """
    if training.packing != "off" or training.train_sampling_strategy in BY_SIZE:
        raise ArgumentError(
            "--streaming true reads records as they come: --packing and --train_sampling_strategy "
            f"{' or '.join(BY_SIZE)} need the sizes of all samples before"
        )
