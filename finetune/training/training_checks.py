"""Stops a training with non-finite losses or gradients, parts without a gradient, or samples without labels.

All checks use sums over the ranks, reduced once per optimizer step, so that every rank stops at the same step with the
same message.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.runtime import outcome
from finetune.training.freezing import Parts, part_of
from finetune.utils.errors import UnusableResultError, UserError

logger = logging.getLogger(__name__)

# Steps without a gradient until a part counts as dead. LoRA's A has none in the first step (B starts at zero).
_STEPS = 2
_TITLES = {
    "vision": "the vision tower",
    "resampler": "the resampler",
    "llm": "the LLM",
    "audio": "the audio tower",
}
# Consecutive samples without a label after which the run stops, counted over as many steps as needed.
_UNLABELLED = 8
# Samples and weights named in a message.
_NAMED = 8


class DeadPartError(UserError):
    """A part that is declared trainable receives no gradient."""


class NonFiniteError(UnusableResultError):
    """Loss or gradient were not finite in too many consecutive steps."""


class NoLabelError(UnusableResultError):
    """Consecutive samples without a single label: nothing is learnt from them."""


class DeadPartCheck:
    """Records which trained parts received a gradient in the steps that used them.

    DeepSpeed's ``safe_get_full_grad`` cannot be used: accelerate's DeepSpeed wrapper steps inside ``backward`` and
    clears the gradients before the Trainer sees them. Hooks on the parameters see this rank's own gradient before it
    is reduced, alike with one process, DDP, ZeRO-2 and ZeRO-3. They are removed as soon as their part had a gradient,
    and do nothing in a micro-batch that does not use the part.

    Args:
        model: the model, before it is wrapped.
        parts: the parts of the model.
        declared: names of the parts that are declared trainable.
    """

    def __init__(self, model: nn.Module, parts: Parts, declared: Iterable[str]) -> None:
        self._handles: dict[str, list[RemovableHandle]] = {part: [] for part in parts if part in set(declared)}
        self._steps = dict.fromkeys(self._handles, 0)
        self._running: set[str] = set()
        self._used: set[str] = set()
        self._hit: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            part = part_of(name, parts)
            if part in self._handles and parameter.requires_grad:
                self._handles[part].append(parameter.register_hook(self._hook(part)))

    def _hook(self, part: str) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            if part in self._running:
                found = gradient.detach().any()
                known = self._hit.get(part)
                self._hit[part] = found if known is None else known | found.to(known.device)

        return look

    def begin(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Records the parts that a micro-batch uses."""
        if self._handles:
            # Rows of skipped samples have no label: they use no part.
            labelled = bool((inputs["labels"] >= 0).any())
            self._running = {part for part in self._handles if labelled and _uses(part, inputs)}
            self._used |= self._running

    def flags(self) -> list[float | torch.Tensor]:
        """Two flags per watched part: used, and gradient seen in this step. The step ends with this call."""
        values: list[float | torch.Tensor] = []
        for part in self._handles:
            values += [float(part in self._used), self._hit.get(part, 0.0)]
        self._used, self._hit, self._running = set(), {}, set()
        return values

    def check(self, flags: list[float]) -> None:
        """Checks the flags of a step, summed over the ranks.

        Raises:
            DeadPartError: a part was used in enough steps and never had a gradient.
        """
        for part, used, hit in zip(list(self._handles), flags[::2], flags[1::2], strict=True):
            if hit:
                for handle in self._handles.pop(part):
                    handle.remove()
            elif used:
                self._steps[part] += 1
        dead = [part for part in self._handles if self._steps[part] >= _STEPS]
        if dead:
            raise DeadPartError(_dead(dead))


def _uses(part: str, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the loss of the batch depends on the part."""
    if part == "llm":
        return True
    if part == "audio":
        return affects_loss(inputs, "audio_bound")
    if "target_sizes" in inputs:  # 4.6 and later: the batch does not say which row an image belongs to
        return bool(len(inputs["target_sizes"])) and bool((inputs["labels"] >= 0).any(dim=1).all())
    return affects_loss(inputs, "image_bound")


def affects_loss(inputs: Mapping[str, torch.Tensor], key: str) -> bool:
    """Whether an image or audio clip of the batch precedes a labelled token, so that the loss depends on it.

    Args:
        inputs: the batch.
        key: key of the (n, 3) ranges of the placeholders: batch row, start, end.
    """
    bounds, labels = inputs.get(key), inputs["labels"]
    if bounds is None or not len(bounds):
        return False
    row, start, end = bounds.t().contiguous()
    positions = torch.arange(labels.shape[1], device=labels.device)
    if (ends := inputs.get("cu_seq_lens_q")) is None:
        last = torch.where(labels >= 0, positions, -1).amax(dim=1)
        return bool((last[row] >= end).any())
    # Packed: tokens of other segments do not attend to it.
    ends = ends.to(positions)
    segment = torch.bucketize(positions, ends[1:], right=True)
    labelled = torch.where(labels[0] >= 0, positions, -1)
    last = torch.full_like(ends[1:], -1).scatter_reduce(0, segment, labelled, "amax")
    return bool((last[torch.bucketize(start, ends[1:], right=True)] >= end).any())


class TrainingChecks(TrainerCallback):
    """Skips updates that are not finite, and stops a training that does not learn.

    DeepSpeed (before 0.19.8 not in bf16 with ZeRO-3, nor in fp32) and the loss scaler of fp16 skip such an update
    themselves; otherwise the gradients are cleared before the optimizer step.

    Args:
        model: the model, before it is wrapped.
        parts: the parts of the model.
        accelerator: of the Trainer.
        declared: names of the parts that are declared trainable.
        limit: number of consecutive non-finite steps after which to stop; 0 never stops.
    """

    def __init__(
        self, model: nn.Module, parts: Parts, accelerator: Accelerator, declared: Iterable[str], limit: int
    ) -> None:
        self.limit = limit
        self.nonfinite_since_log = False
        self.stop_requested = False
        self._accelerator = accelerator
        self._gradients = DeadPartCheck(model, parts, declared)
        self._sources: list[list[str]] = []
        self._bad_rows: list[torch.Tensor] = []
        self._labelled: list[torch.Tensor] = []
        self._unlabelled = 0
        self.in_a_row = 0
        self._finite = 0

    def begin(self, inputs: dict[str, Any]) -> None:
        """Records a micro-batch that is about to be trained on; removes "sources", which the model does not take."""
        self._sources.append(inputs.pop("sources", None) or ["a sample without a source"] * len(inputs["input_ids"]))
        self._labelled.append((inputs["labels"] >= 0).any())
        self._gradients.begin(inputs)

    def samples(self) -> list[str]:
        """Names of the samples of the step so far, on this rank."""
        return [source for batch in self._sources for source in batch]

    def current(self) -> list[str]:
        """Names of the samples of the current micro-batch, on this rank; none in the optimizer step."""
        return self._sources[-1] if self._sources else []

    def record_row_loss(self, row_loss: torch.Tensor) -> None:
        """Records the loss of every row, (B, 2), of the current micro-batch."""
        self._bad_rows.append(~torch.isfinite(row_loss.detach()[:, 0]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks a step when its gradients are complete, before they are applied (with DeepSpeed: after).

        Raises:
            NonFiniteError: too many consecutive steps were not finite.
            DeadPartError: a trainable part receives no gradient.
            NoLabelError: too many consecutive samples had no label.
        """
        device = self._accelerator.device
        own = [
            torch.cat(self._bad_rows).any(),
            self._bad_gradient(args, kwargs["model"]),
            torch.stack(self._labelled).any(),
            len(self.samples()),
            outcome.watch.request is not None,
            *self._gradients.flags(),
        ]
        flags = torch.stack([torch.as_tensor(flag, dtype=torch.float32, device=device) for flag in own])
        total = self._accelerator.reduce(flags, reduction="sum")
        assert isinstance(total, torch.Tensor)
        bad_loss, bad_gradient, labelled, samples, stop, *seen = total.tolist()
        self.stop_requested = bool(stop)
        self._count_labels(state.global_step + 1, bool(labelled), int(samples))
        if bad_loss or bad_gradient:
            if self._accelerator.scaler is None and _engine(self._accelerator) is None:
                # Optimizers skip parameters without a gradient: no update, no weight decay, no change of the moments.
                kwargs["optimizer"].zero_grad(set_to_none=True)
            self._count(args, state.global_step + 1, bool(bad_loss), kwargs["model"])
        else:
            self.in_a_row = 0
            self._finite += 1
            self._gradients.check(seen)
        self._sources, self._bad_rows, self._labelled = [], [], []

    def check_any_finite(self) -> None:
        """Called at the end of training, before a result is saved.

        Raises:
            NonFiniteError: no step was finite.
        """
        if self.in_a_row and not self._finite:
            raise NonFiniteError(
                f"none of the {self.in_a_row} steps was finite: nothing was learned, and no result is saved. The "
                "warnings above name the samples; a base checkpoint with non-finite weights has the same effect"
            )

    def final_error(self) -> NonFiniteError | None:
        """The error to report when the result is saved but the last steps were not finite; None otherwise."""
        if not self.in_a_row:
            return None
        return NonFiniteError(
            f"the last {self.in_a_row} steps were not finite. The saved weights are finite: those after the last "
            "finite step; the warnings above name the samples"
        )

    def _bad_gradient(self, args: TrainingArguments, model: nn.Module) -> bool | torch.Tensor:
        if args.fp16:
            return False  # the loss scaler overflows on purpose; a loss that is not finite still counts
        engine = _engine(self._accelerator)
        if engine is not None:
            norm = engine.get_global_grad_norm()
            return norm is not None and not (math.isfinite(norm) and norm >= 0)  # -1: DeepSpeed's code for NaN
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))

    def _count(self, args: TrainingArguments, step: int, bad_loss: bool, model: nn.Module) -> None:
        """Counts a step that was not finite: logs a warning on rank 0, or raises on all ranks at the limit."""
        self.nonfinite_since_log = True
        self.in_a_row += 1
        samples = gather_object(self._suspects(bad_loss))
        what = "loss" if bad_loss else "gradient"
        if self.in_a_row == self.limit:
            weights = [n for n, p in model.named_parameters() if not torch.isfinite(p.detach()).all()][:_NAMED]
            weights = list(dict.fromkeys(gather_object(weights)))
            raise NonFiniteError(_nonfinite(args, what, step, self.limit, samples, weights))
        if self._accelerator.is_main_process:
            logger.warning(
                "step %d: the %s is not finite, the step changes no weight (%d in a row%s). Samples: %s",
                step, what, self.in_a_row, f", stops at {self.limit}" if self.limit else "", _listed(samples),
            )  # fmt: skip

    def _count_labels(self, step: int, labelled: bool, samples: int) -> None:
        """Raises if too many consecutive samples have no label; with small steps, a few may be skipped by chance."""
        self._unlabelled = 0 if labelled else self._unlabelled + samples
        if self._unlabelled >= _UNLABELLED:
            names = gather_object(self.samples())
            raise NoLabelError(
                f"step {step}: the last {self._unlabelled} samples have no token with a label, so that nothing is "
                f"learnt from them ({_listed(names)}). Either all of them were skipped (the warnings above and "
                "bad_samples.jsonl in the output folder say why), or their answers are not trained on (--train_on, "
                '"loss" of the records)'
            )

    def _suspects(self, bad_loss: bool) -> list[str]:
        """The rows of this rank whose loss is not finite; all of the step when only the gradient is not."""
        rows = self.samples()
        if not bad_loss:
            return rows
        return [source for source, bad in zip(rows, torch.cat(self._bad_rows).tolist(), strict=True) if bad]


def _engine(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine, None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    wrapped = accelerator.deepspeed_engine_wrapped
    return wrapped and wrapped.engine


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more


def _nonfinite(
    args: TrainingArguments, what: str, step: int, limit: int, samples: list[str], weights: list[str]
) -> str:
    first = step - limit + 1
    steps = f"in step {step}" if limit == 1 else f"in {limit} steps in a row ({first} to {step})"
    causes = [f"a learning rate that is too high (--learning_rate is {args.learning_rate:g})"]
    if args.fp16:
        causes.insert(0, "fp16 overflow, which many checkpoints have (--bf16 true if the GPU supports it)")
    if weights:
        causes.insert(0, f"weights that are not finite: {_listed(weights)}")
    elif first == 1:
        causes.insert(0, "a damaged checkpoint (no step was finite)")
    before = "" if first == 1 else f", but the update of step {first - 1} may be the cause"
    causes.append("these samples, if the warnings above name them repeatedly")
    return (
        f"the {what} was not finite {steps}. Samples of step {step}: {_listed(samples)}. Likely causes: "
        f"{'; '.join(causes)}. These steps changed no weight{before}. --max_nonfinite_steps {limit} sets the "
        "limit; 0 never stops"
    )


def _dead(parts: list[str]) -> str:
    names = " and ".join(_TITLES[part] for part in parts)
    off = " ".join(f"--tune_{part} false" for part in parts if part != "llm")
    return (
        f"{names} should train, but had a gradient of exactly zero in {_STEPS} steps whose samples use it. Likely "
        "causes: it was frozen after setup (requires_grad), its output is detached or computed without gradient, or "
        "its gradients underflow in fp16 (--bf16 true if the GPU supports it)"
        + (f". If it is not meant to train: {off}" if off else "")
    )
