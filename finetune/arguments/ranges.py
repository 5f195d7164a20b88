"""Valid ranges of numeric flags, one table for training and all commands; checks of empty and JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.arguments.argv import parse_flags
from finetune.utils.errors import ArgumentError
from finetune.utils.json_objects import parse, read_object

# Larger counts, steps and seconds would overflow somewhere.
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """The valid numbers of a flag; never NaN or infinity.

    Attributes:
        low: lower bound.
        high: upper bound.
        above: whether ``low`` is exclusive.
        below: whether ``high`` is exclusive.
        steps: whether it is a number of steps: a share of all steps below 1, an integer from 1 on.
        also: a special value outside of the range.
        hint: what to do instead, for the message.
    """

    low: float = -math.inf
    high: float = _MOST
    above: bool = False
    below: bool = False
    steps: bool = False
    also: float | None = None
    hint: str = ""

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if value == self.also:
            return True
        if self.steps and value > 1 and value != int(value):
            return False
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def describe(self, value: float) -> str:
        """The message for a value outside of the range."""
        if self.low == self.high:
            return f"it must be {_plain(self.low)}"
        bounds = ["finite"] if not math.isfinite(value) else []
        if self.low > -math.inf:
            bounds.append(f"{'above' if self.above else 'at least'} {_plain(self.low)}")
        if math.isinf(value) or value >= self.high:
            bounds.append(f"{'below' if self.below else 'at most'} {_plain(self.high)}")
        kind = "a whole number of steps, or a share of all steps below 1: " if self.steps else ""
        also = f", or {_plain(self.also)}" if self.also is not None else ""
        return f"it must be {kind}{' and '.join(bounds)}{also}"


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


_COUNT = Range(low=1)
_NOT_NEGATIVE = Range(low=0)
_POSITIVE = Range(low=0, above=True)
_SHARE = Range(low=0, high=1, below=True)
_SEED = Range(low=0, high=2**32 - 1)
_RATE = Range(low=0, above=True, hint="0 trains nothing; --tune_llm, --tune_vision, ... false freeze a part")
# At least one patch.
_PIXELS = Range(low=14 * 14)

RANGES: Mapping[str, Range] = {
    # durations and intervals
    "num_train_epochs": _POSITIVE,
    "epochs": _POSITIVE,
    "max_steps": Range(low=1, also=-1, hint="omit it to train for --num_train_epochs"),
    "logging_steps": Range(low=0, above=True, steps=True, hint="--logging_strategy no switches it off"),
    "save_steps": Range(low=0, above=True, steps=True, hint="--save_strategy no switches it off"),
    "eval_steps": Range(low=0, above=True, steps=True, hint="--eval_strategy no switches it off"),
    "eval_delay": _NOT_NEGATIVE,
    "warmup_steps": Range(low=0, steps=True),
    "save_total_limit": Range(low=1, hint="omit it to keep all checkpoints"),
    "max_nonfinite_steps": Range(low=0, hint="0 never stops"),
    "torch_empty_cache_steps": _COUNT,
    "save_on_signal_timeout": Range(low=0, hint="0 ends at once"),
    "hang_timeout": Range(low=0, hint="0 disables it"),
    # the optimizer
    **dict.fromkeys(("learning_rate", "vision_lr", "resampler_lr", "audio_lr"), _RATE),
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _POSITIVE,
    "max_grad_norm": Range(low=0, hint="0 does not clip"),
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "label_smoothing_factor": Range(
        low=0,
        high=0,
        hint="smoothing needs the logits of all tokens, which are never computed here; omit it",
    ),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    # preference training
    **dict.fromkeys(("pref_ftx", "simpo_gamma"), _NOT_NEGATIVE),
    "pref_beta": Range(low=0, above=True, hint="with 0 the loss does not depend on the model"),
    "dpo_label_smoothing": Range(low=0, high=0.5, below=True, hint="half of the labels wrong teaches nothing"),
    # batches and processes
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "batch_size", "batch"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "packing_tokens"), _COUNT),
    **dict.fromkeys(("packing_items", "vision_batch", "dataloader_prefetch_factor", "ddp_bucket_cap_mb"), _COUNT),
    **dict.fromkeys(("ddp_timeout", "gpus", "model_max_length", "length"), _COUNT),
    "dataloader_num_workers": Range(low=0, hint="0 encodes samples in the training process"),
    "gpu_memory": _POSITIVE,
    "export_size": _POSITIVE,
    "zero": Range(low=0, high=3),
    "port": Range(low=1, high=65535),
    # adapters
    "lora_r": _COUNT,
    "lora_alpha": Range(low=1, hint="the update is multiplied by alpha / r; with 0 it has no effect"),
    "lora_dropout": Range(low=0, high=1, below=True, hint="1 drops everything"),
    "lora_layers_to_transform": _NOT_NEGATIVE,
    # data
    **dict.fromkeys(("max_samples", "limit", "buffer_size", "train", "eval", "images", "samples"), _COUNT),
    "show": _NOT_NEGATIVE,
    "val_size": _NOT_NEGATIVE,
    "max_bad_share": Range(low=0, high=1, hint="1 never stops"),
    "slices": Range(low=0, hint="0 is text only"),
    "experts": Range(low=0, hint="0 is a dense model"),
    "labelled": Range(low=0, high=1, above=True),
    "report_rows": _NOT_NEGATIVE,
    "eval_share": _SHARE,
    "nproc": _COUNT,
    "concurrency": _COUNT,
    "tolerance": _NOT_NEGATIVE,
    "nnodes": _COUNT,
    "node_rank": _NOT_NEGATIVE,
    "master_port": Range(low=1, high=65535),
    **dict.fromkeys(("max_slice_nums", "video_max_slice_nums"), Range(low=1, hint="1 is the thumbnail alone")),
    **dict.fromkeys(("max_image_pixels", "image_max_pixels", "video_max_pixels"), _PIXELS),
    **dict.fromkeys(("video_max_frames", "video_packing", "packing_maxlen"), _COUNT),
    **dict.fromkeys(("video_fps", "double_frame_duration", "time_scale"), _POSITIVE),
    # answers
    "eval_generate": _NOT_NEGATIVE,
    **dict.fromkeys(("eval_max_new_tokens", "max_new_tokens"), _COUNT),
    "temperature": Range(low=0, above=True, hint="--greedy takes the most likely token each time"),
    "top_p": Range(low=0, high=1, above=True),
    "top_k": _NOT_NEGATIVE,
    "repetition_penalty": _POSITIVE,
}
"""Flag without dashes to its range."""

EXEMPT: Mapping[str, str] = {
    "local_rank": "set by torchrun, -1 without",
    "tune_llm_layers": "any number but 0 is valid; 0 is refused by TrainingArguments",
}
"""Numeric flags without a range, and why."""


OBJECTS: Mapping[str, bool] = {
    "accelerator_config": True,
    "fsdp_config": True,
    "gradient_checkpointing_kwargs": False,
    "liger_kernel_config": False,
    "lr_scheduler_kwargs": False,
}
"""Flags that take a JSON object, and whether they also take a file with one."""


def check_ranges(values: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> None:
    """Refuses numbers outside of the range of a flag.

    Args:
        values: values of flags, by name; None and values that are not numbers are ignored.
        origins: where a flag was given, for the message.

    Raises:
        ArgumentError: naming the flag, its value and the range.
    """
    for name, valid in RANGES.items():
        for value in _numbers(values.get(name)):
            if value not in valid:
                origin = (origins or {}).get(name, "command line")
                where = "" if origin == "command line" else f" ({origin})"
                hint = f"; {valid.hint}" if valid.hint else ""
                raise ArgumentError(f"--{name} {value}{where}: {valid.describe(value)}{hint}")


def check_not_empty(argv: Sequence[str]) -> None:
    """Refuses flags with an empty value, as from an unset variable of a script.

    Raises:
        ArgumentError: naming the flag.
    """
    for name, values in parse_flags(argv)[0].items():
        if values and all(not value.strip() for value in values):
            raise ArgumentError(f"--{name} has an empty value ('{values[0]}'): give one, or omit the flag")


def check_objects(values: Mapping[str, Any]) -> None:
    """Refuses values that are neither a JSON object nor, if the flag takes one, a file with one.

    Raises:
        ArgumentError: naming the flag.
    """
    for name, file in OBJECTS.items():
        value = values.get(name)
        if not isinstance(value, str):
            continue
        if value.startswith("{"):
            parse(value, f"--{name} {value}", ArgumentError, "correct it")
        elif not file:
            raise ArgumentError(f"--{name} {value}: it must be a JSON object, such as '{{\"key\": 1}}'")
        else:
            read_object(Path(value), ArgumentError, f"--{name} takes a JSON object, or a file with one")


def _numbers(value: Any) -> Iterator[float]:
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            yield item
