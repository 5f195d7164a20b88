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
from finetune.batching.samplers import EpochOrder, LeanSampler
from finetune.checkpoints import stream_resume
from finetune.checkpoints.base_checkpoint import Checkpoint
from finetune.checkpoints.checkpoint_manager import CheckpointManager, agree, fault_of
from finetune.checkpoints.manifest import zero_stage
from finetune.checkpoints.output_folder import OutputFolder
from finetune.checkpoints.resume import NothingLeftCallback, NothingLeftError
from finetune.checkpoints.saving import finish_adapter, finish_full
from finetune.evaluation.generated_metric import GeneratedMetric
from finetune.evaluation.progress_files import ProgressBar, tolerate_write_errors
from finetune.training.base_loss import check_base_loss
from finetune.training.flops import flops_of
from finetune.training.freezing import full_parts, part_of
from finetune.training.graceful_stop import HangWatch, StopCallback
from finetune.training.optimizer_groups import split_groups
from finetune.training.throughput import Throughput
from finetune.training.watchdog import Watchdog
from finetune.training.zero3_leaves import keep_experts_together
from finetune.utils.errors import WorthlessError

logger = logging.getLogger(__name__)

# The ZeRO stage in which no rank has whole weights.
_SHARDED = 3


class CPMTrainer(Trainer):
    """Trainer with a learning rate per part, token-weighted evaluation and results that load anywhere.

    It overrides, each calling what it overrides:

    - ``train``: resumes streamed data, and refuses a run in which nothing was trained;
    - ``get_train_dataloader``, ``get_eval_dataloader``: packed and length-grouped batches, streamed data, seeds of the
      worker processes that do not depend on a resume;
    - ``get_batch_samples``, ``training_step``, ``log``, ``evaluate``: tokens/s, waiting time and FLOPs of the log, and
      the watchdog of losses and gradients;
    - ``floating_point_ops``: FLOPs of the parts that train, of sharded weights too;
    - ``create_optimizer``: a learning rate per part;
    - ``compute_loss``: the loss per sample for the watchdog, and the base loss at step 0;
    - ``prediction_step``, ``evaluation_loop``: an evaluation loss weighted by tokens, the same for every batch size,
      and metrics on generated answers;
    - ``_save_checkpoint``, ``save_model``: checkpoints that are finite and complete or not there at all, and side files
      that make a result load by itself.

    Args:
        base: the checkpoint the run started from; its tokenizer and processor files go into every save.
        part_learning_rates: learning rate of every part of the network.
        check_base_loss: stop before the first update when the loss of a pretrained checkpoint is near chance.
        keeper: of the checkpoints; it knows which run they are of.
        output: where checkpoints are listed as written by this run.
        **kwargs: those of Trainer.
    """

    def __init__(
        self,
        *,
        base: Checkpoint,
        part_learning_rates: dict[str, float],
        check_base_loss: bool = True,
        keeper: CheckpointManager | None = None,
        output: OutputFolder | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.pop_callback(ProgressCallback) is not None:  # absent with --disable_tqdm, and in notebooks
            self.add_callback(ProgressBar())
        self._output = output
        self.add_callback(NothingLeftCallback())
        self._order = EpochOrder()
        self.add_callback(self._order)
        self.base = base
        self.part_learning_rates = part_learning_rates
        self.check_base_loss = check_base_loss
        self.base_loss: float | None = None
        if zero_stage(self.args.deepspeed) == _SHARDED:
            keep_experts_together(self._network())
        flops = flops_of(self._network(), base.family)
        self.throughput = Throughput(flops, self.accelerator.gather, self.args.device)
        self._passed = 0
        self.generated = self._generated_metric()
        parts = base.family.parts
        trained = {part_of(name, parts) for name, weight in self._network().named_parameters() if weight.requires_grad}
        declared = trained.union(full_parts(self.args))  # pyright: ignore[reportArgumentType]
        limit = self.args.max_nonfinite_steps  # pyright: ignore[reportAttributeAccessIssue]
        self.alarms = Watchdog(self._network(), parts, self.accelerator, declared, limit)
        self.add_callback(self.alarms)
        tolerate_write_errors(self.callback_handler.callbacks)
        self.keeper = keeper or CheckpointManager()
        self.add_callback(self.keeper)
        self._hangs = HangWatch(self.args.hang_timeout, self.alarms.samples)  # pyright: ignore[reportAttributeAccessIssue]
        self.add_callback(self._hangs)
        seconds = self.args.save_on_signal_timeout  # pyright: ignore[reportAttributeAccessIssue]
        self._stops = StopCallback(seconds, lambda: self.alarms.asked_to_stop)
        if seconds > 0:
            self.add_callback(self._stops)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Training; none when the checkpoint that was resumed from has all the steps already.

        Raises:
            WorthlessError: no step was trained, or none was finite.
            SpaceError: there is no space for a single checkpoint.
        """
        flags: Any = self.args
        if (checkpoint := kwargs.get("resume_from_checkpoint")) is not None:
            self._passed = stream_resume.batches_passed(Path(checkpoint), self._dealt())
        self.keeper.begin(flags, self._network(), self.alarms, checkpoint and Path(checkpoint), self._output)
        try:
            with self._stops, self._hangs:
                done = super().train(*args, **kwargs)
                self._stops.check(self.args, self.state, self.keeper.missing(self.state.global_step))
        except NothingLeftError:
            if not self.state.global_step:
                raise WorthlessError(
                    f"0 steps were trained: --max_steps {flags.max_steps}, --num_train_epochs "
                    f"{flags.num_train_epochs:g}"
                ) from None
            logger.info("all %d steps were done before: nothing is trained", self.state.global_step)
            return TrainOutput(self.state.global_step, math.nan, {})
        finally:
            self.keeper.end(flags, self.state)
        if not self.state.global_step:
            raise WorthlessError("0 steps were trained: the data gave no batch")
        self.alarms.check_any()
        return done

    def _dealt(self) -> dict[str, Any] | None:
        """How streamed records are dealt; None for other data."""
        dataset = self.train_dataset
        return (
            stream_resume.dealt(dataset.streamed.stream.state, self.args)
            if isinstance(dataset, StreamedDataset)
            else None
        )

    def get_train_dataloader(self) -> DataLoader:
        """The loader of the training data.

        That of streamed data is not handed to accelerate, which would let rank 0 read all and send it to the others:
        the stream deals its records to ranks and loader processes by itself, and never ends.
        """
        dataset: Any = self.train_dataset
        args: Any = self.args
        if isinstance(dataset, StreamedDataset):
            batch_size = self._train_batch_size
            dataset.deal(args.process_index, args.world_size, batch_size, self._passed)
            loader: Any = DataLoader(
                dataset, batch_size=batch_size, collate_fn=self.data_collator, **loader_options(args)
            )
            return self._with_own_seeds(loader)
        if is_planned(args):
            collate: Any = self.data_collator
            if args.packing != "off":
                collate = PackingCollator(dataset.intake.fitter.encoder.empty("a row without samples"))
            loader = planned_loader(dataset, args, self.accelerator, collate, self._order)
        else:
            loader = super().get_train_dataloader()
            if type(sampler := loader.get_sampler()) is SeedableRandomSampler:
                self._order.sampler = LeanSampler(sampler)
                loader.set_sampler(self._order.sampler)
        # Batches move when it is their turn: on the CPU they are counted without waiting for the device, and of those
        # that are accumulated only one at a time takes its memory.
        loader.device = None
        return self._with_own_seeds(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The loader of the evaluation data."""
        return self._with_own_seeds(super().get_eval_dataloader(*args, **kwargs))

    def _with_own_seeds(self, loader: DataLoader) -> DataLoader:
        """Draws the seeds of loader processes from a generator of their own.

        They would be drawn from the one that dropout uses on the CPU, and how often depends on whether the processes
        are new: those of a resumed run are in its second epoch, where they would have stayed.
        """
        generator = torch.Generator().manual_seed(self.args.seed)
        for each in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate wraps it, and copies from both
            each.generator = generator
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of the next step; the time until they are there is noted."""
        return super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the flags, its groups split where parts have learning rates of their own."""
        optimizer = super().create_optimizer(model)
        source = self._network() if model is None else model
        parts, rates = self.base.family.parts, self.part_learning_rates
        split_groups(optimizer, {id(weight): rates[part_of(name, parts)] for name, weight in source.named_parameters()})
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, counted for the throughput of the log."""
        self.throughput.begin(inputs)
        self.alarms.begin(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        # The Trainer sums losses and never gets rid of a NaN again; ``log`` puts it where it belongs.
        return loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of the micro-batch that was just trained on, for total_flos, by the cost model of the log.

        The library's own count goes through all weights in every micro-batch, takes each for one of the LLM that
        trains, and finds none under ZeRO-3.
        """
        return round(self.throughput.operations)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The network's own loss; the very first one is the loss of the base and is reported."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.alarms.note(outputs.row_loss)  # pyright: ignore[reportAttributeAccessIssue]
        if self.base_loss is None and model.training and self.state.global_step == 0:
            self._report_base_loss(outputs.row_loss)  # pyright: ignore[reportAttributeAccessIssue]
        return (loss, outputs) if return_outputs else loss

    def _report_base_loss(self, row_loss: torch.Tensor) -> None:
        total, count = self._sum_over_ranks(row_loss.detach().sum(0))
        if not count:
            return  # every row of this micro-batch holds the place of a sample that is left out
        self.base_loss = total / count
        if self.is_world_process_zero():
            chance = math.log(self.base.vocab_size)
            logger.info("base loss at step 0: %.4f (chance is ln(vocabulary) = %.2f)", self.base_loss, chance)
        if self.check_base_loss:
            check_base_loss(self.base_loss, self.base.vocab_size, self._network(), self.base.name)

    def _network(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, nn.Module)
        return model

    def _sum_over_ranks(self, values: torch.Tensor) -> list[float]:
        total = self.accelerator.reduce(values, reduction="sum")
        assert isinstance(total, torch.Tensor)
        return total.tolist()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to training logs how fast it goes, over all ranks and without evaluation and saving."""
        if "loss" in logs:
            logs["loss"] = math.nan if self.alarms.since_log else logs["loss"]
            self.alarms.since_log = False
            logs |= self.throughput.log()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluation, whose time does not count as training time."""
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
        """Per sample the sum of losses and the number of labelled tokens, (B, 2); no logits are kept."""
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
        total, count = output.predictions.sum(axis=0)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = float(total / count)
        output.metrics[f"{metric_key_prefix}_tokens"] = int(count)
        figures = self._generate()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _generated_metric(self) -> GeneratedMetric | None:
        """The metric of --eval_generate; made before training, so that a wrong name is told in time."""
        args: Any = self.args
        dataset: Any = self.eval_dataset
        if not args.eval_generate or dataset is None:
            return None
        if zero_stage(args.deepspeed) == _SHARDED and not args.eval_generate_zero3:
            logger.warning(
                "--eval_generate is left out: under ZeRO-3 every generated token gathers all weights; "
                "--eval_generate_zero3 true does it all the same"
            )
            return None
        return GeneratedMetric(
            dataset.samples,
            dataset.intake.fitter.encoder,
            count=args.eval_generate,
            metric=args.eval_metric,
            max_new_tokens=args.eval_max_new_tokens,
            batch_size=args.per_device_eval_batch_size,
            skip_bad=dataset.intake.on_bad_sample == "skip",
        )

    def _generate(self) -> dict[str, float]:
        """The figures of --eval_generate, the same on every rank."""
        if self.generated is None:
            return {}
        args: Any = self.args
        synced = args.world_size > 1 and zero_stage(args.deepspeed) == _SHARDED
        with self.compute_loss_context_manager():
            ranks = {"rank": args.process_index, "world": args.world_size}
            return self.generated(self._network(), **ranks, synced=synced, step=self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint that is finite and complete, or none: training goes on either way."""
        flags: Any = self.args
        write_all = partial(super()._save_checkpoint, model, trial)
        self.keeper.save(flags, self.state, self.accelerator, self._network(), write_all)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves weights, then what makes the folder loadable by itself.

        Raises:
            UnsavedError: weights of a checkpoint could not be written, on every rank alike.
            NotSavedError: a result could not be written; what was there before is still there.
            WorthlessError: weights of a result are not finite; nothing is written.
        """
        start = time.perf_counter()
        folder = Path(output_dir or self.args.output_dir or ".")
        if folder == Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}":
            if folder.is_dir() and self.args.should_save:
                # A checkpoint of this step, from an interrupted or former run: none of its files may pass for new ones.
                shutil.rmtree(folder)
            self._save_weights(folder, streamed=True)
        else:
            flags: Any = self.args
            self.keeper.save_result(flags, self.accelerator, self._network(), folder, self._save_weights)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        self.throughput.pause(time.perf_counter() - start)

    def _save_weights(self, folder: Path, *, streamed: bool = False) -> None:
        """Writes weights and their side files into a folder.

        Raises:
            UnsavedError: some rank could not, on every rank alike.
        """

        def work() -> None:
            Trainer.save_model(self, str(folder), _internal_call=True)
            if self.args.should_save:
                model = self._network()
                if isinstance(model, PeftModel):
                    finish_adapter(model, folder, self.base)
                else:
                    finish_full(folder, self.base)
                if streamed and (dealt := self._dealt()) is not None:
                    stream_resume.write(folder, dealt)

        self.accelerator.wait_for_everyone()
        agree(self.accelerator, fault_of(work, alone=self.accelerator.num_processes == 1))
