"""PreferenceTrainer: CPMTrainer with a loss of pairs of answers (``--stage dpo``)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, send_to_device
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback

from dataset import SupervisedDataset
from finetune.arguments.preference import PreferenceOptions
from finetune.batching.reference_cache import ReferenceCache, ReferenceExamples, batches_of_rank
from finetune.encoding.example import Example
from finetune.training.preference_loss import FIGURES, pair_figures
from finetune.utils.errors import UserError
from trainer import CPMTrainer

logger = logging.getLogger(__name__)


class PreferenceTrainer(CPMTrainer):
    """Trains on preference pairs: a batch of B pairs has 2 B rows, the chosen answers first, that share their media.

    TRL's trainer makes its batches and calls the model itself, so that it takes neither our encoder nor the loss of our
    output layer; the formulas are its own (``finetune.training.preference_loss``). Overrides ``compute_loss``,
    ``get_batch_samples`` (the mean is over the pairs of the step), ``log``, ``evaluate`` and the figures of the
    evaluation.

    Args:
        preference: the loss and its reference.
        reference_key: text that changes with the model that training starts from.
        base_is_start: whether training starts from the model without its adapter.
        **kwargs: passed to ``CPMTrainer``.
    """

    def __init__(
        self, *, preference: PreferenceOptions, reference_key: str, base_is_start: bool, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.preference = preference
        self._reference_key, self._base_is_start = reference_key, base_is_start
        self._sums = torch.zeros(len(FIGURES) + 1)
        self.add_callback(_ReferenceCallback(self))

    # ---- the reference ----

    def prepare_references(self) -> None:
        """Reads or computes the log-probabilities of the reference for all data sets; a collective call.

        Raises:
            UserError: they are not cached, and the model has been trained already.
        """
        if not self.preference.needs_reference or self.preference.reference != "cached":
            return
        for dataset in (self.train_dataset, self.eval_dataset):
            if isinstance(dataset, SupervisedDataset) and dataset.references is None:
                dataset.references = self._references(dataset)

    def _references(self, dataset: SupervisedDataset) -> np.ndarray:
        policy, main = dataset.sample_policy, self.is_world_process_zero()
        cache = ReferenceCache(policy, self._reference_key) if main else None
        known = [None if cache is None or policy.remeasure else cache.read()]
        broadcast_object_list(known)
        if known[0] is not None:
            logger.info("log-probabilities of the reference: %d pairs, cached", len(dataset))
            return known[0]
        table = self._computed(dataset)
        if cache is not None:
            cache.write(table)
        return table

    def _computed(self, dataset: SupervisedDataset) -> np.ndarray:
        """The table (n, 2) by the model that training starts from."""
        start = self.state.global_step == 0
        if not start and not self._base_is_start:
            raise UserError(
                "the log-probabilities of the reference are not in the cache (its folder or the data have changed), "
                f"and the model has been trained for {self.state.global_step} steps: start again, or restore the cache"
            )
        args: Any = self.args
        size, world = args.per_device_train_batch_size, args.world_size
        own = batches_of_rank(len(dataset), size, args.process_index, world)
        loader = DataLoader(
            ReferenceExamples(dataset.sample_policy),
            batch_sampler=own,
            collate_fn=partial(_collated, self.data_collator, self.filler(dataset)),
            num_workers=args.dataloader_num_workers,
        )
        table = torch.zeros(len(dataset), 2, device=args.device)
        with self._as_reference(adapter=start):
            for numbers, batch in zip(own, self._with_bar(loader), strict=True):
                logps = self._row_logps(batch)
                table[numbers] = logps[: len(numbers)]
                self._hang_callback.progress()
        return self.accelerator.reduce(table).cpu().numpy()  # pyright: ignore[reportAttributeAccessIssue]

    def _with_bar(self, loader: DataLoader) -> Iterable[Any]:
        return tqdm(loader, "log-probabilities of the reference", delay=1, disable=not self.is_world_process_zero())

    def _row_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of both answers of a batch of pairs, (B, 2)."""
        inputs = {name: value for name, value in batch.items() if name not in ("sources", "pair_weights")}
        model: Any = self.model_wrapped
        row_loss = model(**send_to_device(inputs, self.args.device)).row_loss
        return -row_loss[:, 0].view(2, -1).T

    def _as_reference(self, *, adapter: bool) -> ExitStack:
        """The model without gradients and dropout, and without its adapter unless ``adapter``."""
        stack, model = ExitStack(), self._unwrapped()
        stack.enter_context(torch.no_grad())
        stack.enter_context(self.compute_loss_context_manager())
        if not adapter and isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        if model.training:
            wrapped: Any = self.model_wrapped
            wrapped.eval()
            stack.callback(wrapped.train)
        return stack

    # ---- the loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of the next step, and their number of pairs, over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = torch.stack([batch["pair_weights"].sum() for batch in batches]).sum().to(device)
        if self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count)
            assert isinstance(count, torch.Tensor)
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of the pairs: in training their sum over the number of pairs of the step, else their mean.

        The outputs have the loss and figures of every pair as ``row_loss``: (B, 8), the last column is its weight.
        """
        weights, reference = inputs.pop("pair_weights"), inputs.pop("reference_logps", None)
        if self.preference.needs_reference and self.preference.reference == "adapter_off":
            with self._as_reference(adapter=False):
                reference = -model(**inputs).row_loss[:, 0].view(2, -1).T
        row_loss = model(**inputs, row_graph=True).row_loss
        loss, table = pair_figures(row_loss, reference, self.preference)
        loss = torch.where(weights > 0, loss, loss * 0)  # a skipped pair has no labels
        rows = torch.cat([loss.detach()[:, None], table, weights[:, None]], dim=1)
        if not model.training or num_items_in_batch is None:
            total = loss.sum() / weights.sum().clamp(min=1)
        else:
            ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
            total = loss.sum() * ranks / torch.as_tensor(num_items_in_batch).clamp(min=1)
        if model.training:
            self.record_rows(row_loss)
            self._sums = self._sums.to(rows.device) + (rows[:, 1:] * weights[:, None]).sum(0)
        return (total, {"loss": total, "row_loss": rows}) if return_outputs else total

    # ---- figures ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean figures of the pairs since the last entry, over all ranks."""
        if "loss" in logs:
            *sums, count = self._sum_over_ranks(self._sums.to(self.args.device))
            self._sums = torch.zeros_like(self._sums)
            if count:
                logs |= {name: total / count for name, total in zip(FIGURES, sums, strict=True)}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates on pairs."""
        self.prepare_references()
        return super().evaluate(*args, **kwargs)

    def evaluation_figures(self, rows: Any) -> dict[str, float]:
        """Loss and figures, means over the pairs; tokens of their answers."""
        rows = rows[rows[:, -1] > 0]
        means = dict(zip(("loss", *FIGURES), rows[:, :-1].mean(axis=0).tolist(), strict=True))
        return {**means, "tokens": int(rows[:, -3:-1].sum())}


def _collated(collator: Any, filler: Example, examples: Sequence[Example]) -> Any:
    return collator(examples or [filler])


class _ReferenceCallback(TrainerCallback):
    """Prepares the references when the model is wrapped and before the first batch is read."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Training starts, or is resumed."""
        self._trainer.prepare_references()
