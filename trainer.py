"""CPMTrainer: the few methods of the Hugging Face Trainer that differ."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from dataset import PackingCollator, StreamedDataset
from finetune.batching.dataloaders import is_planned, loader_options, planned_loader
from finetune.batching.samplers import CompactRandomSampler, SamplerEpochCallback
from finetune.checkpoints import stream_resume
from finetune.checkpoints.base_checkpoint import BaseCheckpoint
from finetune.checkpoints.checkpoint_manager import CheckpointManager, raise_if_any_failed, write_failure
from finetune.checkpoints.manifest import zero_stage
from finetune.checkpoints.output_folder import OutputFolder
from finetune.checkpoints.resume import NoStepsLeftCallback, NoStepsLeftError
from finetune.checkpoints.saving import finish_adapter, finish_full
from finetune.encoding.example import Example
from finetune.evaluation.generation_evaluator import make_generation_evaluator
from finetune.evaluation.progress_files import ProgressBar, tolerate_write_errors
from finetune.training.base_loss import check_base_loss
from finetune.training.flops import flops_of
from finetune.training.freezing import full_parts, part_of
from finetune.training.graceful_stop import StopCallback
from finetune.training.gradient_norms import GradientNormsCallback
from finetune.training.hang_watchdog import HangCallback
from finetune.training.optimizer_groups import split_groups
from finetune.training.throughput import Throughput
from finetune.training.training_checks import TrainingChecks
from finetune.training.zero3_leaves import keep_experts_together
from finetune.utils.errors import UnusableResultError

logger = logging.getLogger(__name__)

# The ZeRO stage that shards the weights.
_SHARDED = 3


class CPMTrainer(Trainer):
    """Trainer with a learning rate per part, token-weighted evaluation and results that load anywhere.

    It overrides, each calling what it overrides:

    - ``train``: resumes streamed data, and raises if no step was trained;
    - ``get_train_dataloader``, ``get_eval_dataloader``: packed and length-grouped batches, streamed data, seeds of the
      dataloader workers that do not depend on a resume;
    - ``get_batch_samples``, ``training_step``, ``log``, ``evaluate``: tokens/s, data waiting time, FLOPs and gradient
      norms per part in the log, and the checks of losses and gradients;
    - ``floating_point_ops``: FLOPs of frozen and trained parts, also with ZeRO-3;
    - ``create_optimizer``: a learning rate per part;
    - ``compute_loss``: the loss per sample for the checks, and the base loss at step 0;
    - ``prediction_step``, ``evaluation_loop``: an evaluation loss weighted by tokens, the same for every batch size,
      and metrics on generated answers;
    - ``_save_checkpoint``, ``save_model``: checkpoints that are finite and complete or not there at all, and side files
      that make a result load by itself.

    Args:
        base: the checkpoint the run started from; its tokenizer and processor files are copied into every save.
        part_learning_rates: learning rate of every part of the model.
        check_base_loss: stop before the first update when the loss of a pretrained checkpoint is near chance.
        checkpoint_manager: writes, rotates and removes checkpoints.
        output: the output folder, which lists the checkpoints written by this run.
        **kwargs: passed to Trainer.
    """

    def __init__(
        self,
        *,
        base: BaseCheckpoint,
        part_learning_rates: dict[str, float],
        check_base_loss: bool = True,
        checkpoint_manager: CheckpointManager | None = None,
        output: OutputFolder | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.pop_callback(ProgressCallback) is not None:  # absent with --disable_tqdm, and in notebooks
            self.add_callback(ProgressBar())
        self._output = output
        self.add_callback(NoStepsLeftCallback())
        self._order = SamplerEpochCallback()
        self.add_callback(self._order)
        self.base = base
        self.part_learning_rates = part_learning_rates
        self.check_base_loss = check_base_loss
        self.base_loss: float | None = None
        if (stage := zero_stage(self.args.deepspeed)) == _SHARDED:
            keep_experts_together(self._unwrapped())
        flops = flops_of(self._unwrapped(), base.family)
        self.throughput = Throughput(flops, self.accelerator.gather, self.args.device)
        self._batches_seen = 0
        self.generated = make_generation_evaluator(self.args, self.eval_dataset, sharded=stage == _SHARDED)
        self.gradient_norms = GradientNormsCallback(self.accelerator, sharded=stage > 0)
        self.add_callback(self.gradient_norms)
        self.checks = self._make_checks()
        self.add_callback(self.checks)
        tolerate_write_errors(self.callback_handler.callbacks)
        self.checkpoint_manager = checkpoint_manager or CheckpointManager()
        self.add_callback(self.checkpoint_manager)
        timeout = self.args.hang_timeout  # pyright: ignore[reportAttributeAccessIssue]
        self._hang_callback = HangCallback(timeout, self.checks.samples)
        self.add_callback(self._hang_callback)
        seconds = self.args.save_on_signal_timeout  # pyright: ignore[reportAttributeAccessIssue]
        self._stop_callback = StopCallback(seconds, lambda: self.checks.stop_requested)
        if seconds > 0:
            self.add_callback(self._stop_callback)

    def _make_checks(self) -> TrainingChecks:
        """The checks of every step; parts count as trained by their flags, and where a weight requires a gradient."""
        model, parts = self._unwrapped(), self.base.family.parts
        trained = {part_of(name, parts) for name, weight in model.named_parameters() if weight.requires_grad}
        declared = trained.union(full_parts(self.args))  # pyright: ignore[reportArgumentType]
        limit = self.args.max_nonfinite_steps  # pyright: ignore[reportAttributeAccessIssue]
        return TrainingChecks(model, parts, self.accelerator, declared, limit)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains; does nothing when the resumed checkpoint has all steps of the run already.

        Raises:
            UnusableResultError: no step was trained, or the loss or gradient of none was finite.
            SpaceError: the disk has no space for a single checkpoint.
        """
        flags: Any = self.args
        if (checkpoint := kwargs.get("resume_from_checkpoint")) is not None:
            self._batches_seen = stream_resume.batches_seen(Path(checkpoint), self._stream_assignment())
        self.checkpoint_manager.begin(
            flags, self._unwrapped(), self.checks, checkpoint and Path(checkpoint), self._output
        )
        try:
            with self._stop_callback, self._hang_callback:
                done = super().train(*args, **kwargs)
                not_saved = self.checkpoint_manager.why_not_saved(self.state.global_step)
                self._stop_callback.check(self.args, self.state, not_saved)
        except NoStepsLeftError:
            if not self.state.global_step:
                raise UnusableResultError(
                    f"0 steps were trained: --max_steps {flags.max_steps}, --num_train_epochs "
                    f"{flags.num_train_epochs:g}"
                ) from None
            logger.info("the checkpoint has all %d steps already: nothing is trained", self.state.global_step)
            return TrainOutput(self.state.global_step, math.nan, {})
        finally:
            self.checkpoint_manager.end(flags, self.state)
        if not self.state.global_step:
            raise UnusableResultError("0 steps were trained: the training data gave no batch")
        self.checks.check_any_finite()
        return done

    def _stream_assignment(self) -> dict[str, Any] | None:
        """How streamed records are assigned to ranks and workers; None for data that is not streamed."""
        dataset = self.train_dataset
        return (
            stream_resume.assignment(dataset.streamed.stream.state, self.args)
            if isinstance(dataset, StreamedDataset)
            else None
        )

    def get_train_dataloader(self) -> DataLoader:
        """The dataloader of the training data.

        For streamed data it is not passed to accelerate, with which rank 0 would read everything and send it to the
        others: the stream assigns records to ranks and dataloader workers itself, and is infinite.
        """
        dataset: Any = self.train_dataset
        args: Any = self.args
        if isinstance(dataset, StreamedDataset):
            batch_size = self._train_batch_size
            dataset.set_shard(args.process_index, args.world_size, batch_size, self._batches_seen)
            loader: Any = DataLoader(
                dataset, batch_size=batch_size, collate_fn=self.data_collator, **loader_options(args)
            )
            return self._with_own_seeds(loader)
        if is_planned(args):
            collate: Any = self.data_collator
            if args.packing != "off":
                collate = PackingCollator(self.filler(dataset), pairs=collate.pairs)
            loader = planned_loader(dataset, args, self.accelerator, collate, self._order)
        else:
            loader = super().get_train_dataloader()
            if type(sampler := loader.get_sampler()) is SeedableRandomSampler:
                self._order.sampler = CompactRandomSampler(sampler)
                loader.set_sampler(self._order.sampler)
        # Each micro-batch is moved to the device when it is used: on the CPU tokens are counted without synchronising,
        # and only one micro-batch of an accumulated step takes device memory.
        loader.device = None
        return self._with_own_seeds(loader)

    @staticmethod
    def filler(dataset: Any) -> Example:
        """An example for a rank without examples in a micro-batch."""
        return dataset.sample_policy.length_policy.encoder.empty("a row without samples")

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The dataloader of the evaluation data."""
        return self._with_own_seeds(super().get_eval_dataloader(*args, **kwargs))

    def _with_own_seeds(self, loader: DataLoader) -> DataLoader:
        """Draws the seeds of dataloader workers from a separate generator.

        By default they come from the global CPU generator, which dropout uses too, once per start of the workers. A
        resumed run starts them once more than an uninterrupted one, whose dropout would then differ.
        """
        generator = torch.Generator().manual_seed(self.args.seed)
        for each in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate wraps it, and copies from both
            each.generator = generator
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of the next step; measures the time spent waiting for them."""
        return super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the flags, with a parameter group per part, learning rate and weight decay."""
        optimizer, source = super().create_optimizer(model), self._unwrapped() if model is None else model
        parts = {id(weight): part_of(name, self.base.family.parts) for name, weight in source.named_parameters()}
        self.gradient_norms.parts = split_groups(optimizer, parts, self.part_learning_rates)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, counted for the throughput of the log."""
        self.throughput.begin(inputs)
        self.checks.begin(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        # The Trainer sums losses, so that one NaN would stay in all later logs; ``log`` reports it for its interval.
        return loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of the last micro-batch, for total_flos, by the cost model of ``training.flops``.

        The Trainer's own count treats every weight as a trained one of the LLM, and finds no weights under ZeRO-3.
        """
        return round(self.throughput.operations)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of the model's forward; the first one is the base loss, which is logged and checked."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.record_rows(outputs.row_loss)  # pyright: ignore[reportAttributeAccessIssue]
        return (loss, outputs) if return_outputs else loss

    def record_rows(self, row_loss: torch.Tensor) -> None:
        """Shows the loss of every row of a micro-batch in training, (B, 2), to the checks; logs the base loss."""
        self.checks.record_row_loss(row_loss)
        if self.base_loss is None and self.state.global_step == 0:
            self._report_base_loss(row_loss)

    def _report_base_loss(self, row_loss: torch.Tensor) -> None:
        total, count = self._sum_over_ranks(row_loss.detach().sum(0))
        if not count:
            return  # all samples of this micro-batch were skipped; their rows have no labels
        self.base_loss = total / count
        if self.is_world_process_zero():
            chance = math.log(self.base.vocab_size)
            logger.info("base loss at step 0: %.4f (chance is ln(vocabulary) = %.2f)", self.base_loss, chance)
        if self.check_base_loss:
            check_base_loss(self.base_loss, self.base.vocab_size, self._unwrapped(), self.base.name)

    def _unwrapped(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, nn.Module)
        return model

    def _sum_over_ranks(self, values: torch.Tensor) -> list[float]:
        total = self.accelerator.reduce(values, reduction="sum")
        assert isinstance(total, torch.Tensor)
        return total.tolist()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the throughput to training logs, over all ranks and without the time of evaluation and saving."""
        if "loss" in logs:
            logs["loss"] = math.nan if self.checks.nonfinite_since_log else logs["loss"]
            self.checks.nonfinite_since_log = False
            logs |= self.gradient_norms.log(logs.get("grad_norm"), self.args.max_grad_norm) | self.throughput.log()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; the time does not count as training time."""
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.throughput.pause(time.perf_counter() - start)
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss and, as predictions and labels, the summed loss and number of labelled tokens per sample, (B, 2)."""
        inputs.pop("sources", None)
        loss, row_loss, _ = super().prediction_step(model, inputs, False, ["logits", "past_key_values"])
        return loss, row_loss, row_loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The token-weighted loss: the same for every batch size and number of ranks."""
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        figures = {**self.evaluation_figures(output.predictions), **self._generate()}
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def evaluation_figures(self, rows: Any) -> dict[str, float]:
        """The loss per token and the number of tokens, from the rows (n, 2) of ``prediction_step``."""
        total, count = rows.sum(axis=0)
        return {"loss": float(total / count), "tokens": int(count)}

    def _generate(self) -> dict[str, float]:
        """The figures of --eval_generate, the same on every rank."""
        if self.generated is None:
            return {}
        args: Any = self.args
        synced = args.world_size > 1 and zero_stage(args.deepspeed) == _SHARDED
        with self.compute_loss_context_manager():
            ranks = {"rank": args.process_index, "world": args.world_size}
            return self.generated(self._unwrapped(), **ranks, synced=synced, step=self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint if the weights are finite; training continues if it cannot be written."""
        flags: Any = self.args
        write_all = partial(super()._save_checkpoint, model, trial)
        self.checkpoint_manager.save(flags, self.state, self.accelerator, self._unwrapped(), write_all)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves weights and the side files (tokenizer, processor, configuration) that make the folder loadable.

        Raises:
            UnsavedError: weights of a checkpoint could not be written; raised on every rank.
            NotSavedError: a result could not be written; a previous result is unchanged.
            UnusableResultError: weights of a result are not finite; nothing is written.
        """
        start = time.perf_counter()
        folder = Path(output_dir or self.args.output_dir or ".")
        if folder == Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}":
            if folder.is_dir() and self.args.should_save:
                # Left by an interrupted or earlier run: none of its files may be mistaken for new ones.
                shutil.rmtree(folder)
            self._save_weights(folder, is_checkpoint=True)
        else:
            flags: Any = self.args
            self.checkpoint_manager.save_result(flags, self.accelerator, self._unwrapped(), folder, self._save_weights)
        self.throughput.pause(time.perf_counter() - start)

    def _save_weights(self, folder: Path, *, is_checkpoint: bool = False) -> None:
        """Writes weights and their side files into a folder.

        Raises:
            UnsavedError: a rank could not write; raised on every rank.
        """

        def work() -> None:
            Trainer.save_model(self, str(folder), _internal_call=True)
            if self.args.should_save:
                model = self._unwrapped()
                if isinstance(model, PeftModel):
                    finish_adapter(model, folder, self.base)
                else:
                    finish_full(folder, self.base)
                if is_checkpoint and (assignment := self._stream_assignment()) is not None:
                    stream_resume.write(folder, assignment)

        self.accelerator.wait_for_everyone()
        raise_if_any_failed(self.accelerator, write_failure(work, alone=self.accelerator.num_processes == 1))
