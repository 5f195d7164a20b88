"""Every flag of finetune.py, where its default comes from, and which combinations are refused."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple, NoReturn

import transformers
import yaml
from transformers import HfArgumentParser
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_cuda_available

from finetune.activations import hand_over
from finetune.batching import BatchArguments, check_streamed_batches, resolve_batches
from finetune.checks import check_data, check_machine, check_q_lora, check_targets, check_training, resolve_attention
from finetune.config.deepspeed import check_deepspeed, load_deepspeed
from finetune.config.ranges import check_given, check_objects, check_ranges
from finetune.config.resolve import Resolved, resolve
from finetune.data_flags import DataArguments
from finetune.ending import EndingArguments
from finetune.errors import ArgumentError, UserError
from finetune.flags import LoraArguments, MemoryArguments, ModelArguments, check_lora, check_memory
from finetune.zero import check_zero

logger = logging.getLogger(__name__)

# Below this LoRA hardly moves: the adapters start at zero and most published failures used 1e-6.
LOW_LORA_LEARNING_RATE = 1e-5


# What PyYAML puts behind a single value.
_DOCUMENT_END = "\n...\n"

# Secrets, and objects that transformers derives from other flags.
_NOT_RECORDED = ("hub_token", "accelerator_config")

# True and False are what older scripts pass.
_RESUME_WORDS = {"none": None, "false": None, "auto": "auto", "true": "auto"}


@dataclass
class TrainingArguments(MemoryArguments, BatchArguments, EndingArguments, transformers.TrainingArguments):
    """The flags of transformers.TrainingArguments, with defaults that learn, and those of the official scripts."""

    output_dir: str | None = field(default="output", metadata={"help": "Where checkpoints and the result go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Use a non-empty output folder; a former result in it is removed."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "auto continues from the newest complete checkpoint in output_dir, or starts when there is none; "
            "a checkpoint-N folder continues from that one; none (default) always starts."
        },
    )
    model_max_length: int = field(default=2048, metadata={"help": "Longest sample in tokens, images included."})
    tune_vision: bool | None = field(
        default=None, metadata={"help": "Train the vision tower (in full). Default: true without LoRA, false with."}
    )
    tune_resampler: bool | None = field(
        default=None, metadata={"help": "Train the resampler (in full). Default: true, unless lora_parts has it."}
    )
    tune_audio: bool = field(default=False, metadata={"help": "Train the audio tower (in full)."})
    tune_llm: bool | None = field(
        default=None, metadata={"help": "Train the LLM in full. Default: true without LoRA; refused with it."}
    )
    tune_llm_layers: int | None = field(
        default=None,
        metadata={
            "help": "Of the LLM train only the last so many layers (a negative number: the first), in full; without "
            "embeddings and output layer."
        },
    )
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters in lora_parts."})
    lora_parts: list[str] = field(
        default_factory=lambda: ["llm"],
        metadata={"help": "Parts that get adapters.", "choices": ["llm", "vision", "resampler", "audio"]},
    )
    learning_rate: float = field(
        default=None,  # pyright: ignore[reportAssignmentType, reportArgumentType]
        metadata={"help": "Default: 1e-4 with LoRA, 1e-5 without."},
    )
    vision_lr: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the vision tower. Default: a fifth of learning_rate; all of it for LoRA."},
    )
    resampler_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the resampler. Default: learning_rate."}
    )
    audio_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the audio tower. Default: as vision_lr."}
    )
    bf16: bool = field(
        default=None,  # pyright: ignore[reportAssignmentType, reportArgumentType]
        metadata={"help": "Default: true where the GPU has it."},
    )
    fp16: bool = field(
        default=None,  # pyright: ignore[reportAssignmentType, reportArgumentType]
        metadata={"help": "Default: true on a GPU without bf16; with loss scaling."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept for official launchers; stays false."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Samples per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "The same in evaluation."})
    eval_generate: int = field(
        default=0,
        metadata={"help": "Evaluation samples that the model answers at every evaluation, scored by eval_metric."},
    )
    eval_metric: str = field(
        default="auto",
        metadata={"help": "Metric of eval_generate, logged as eval_<metric>; a name or a function as in evaluate."},
    )
    eval_max_new_tokens: int = field(default=64, metadata={"help": "Longest answer of eval_generate, in tokens."})
    eval_generate_zero3: bool = field(
        default=False,
        metadata={"help": "eval_generate under ZeRO-3 too: right, but slow, as every token gathers all weights."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps (below 1: share of all)."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "No effect: NaN is logged as NaN."})
    max_nonfinite_steps: int = field(
        default=3, metadata={"help": "Stop after so many steps in a row with a loss or gradient not finite; 0: never."}
    )
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where logs go; none for off."})
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that prepare samples, per rank."})
    dataloader_persistent_workers: bool = field(
        default=None,  # pyright: ignore[reportAssignmentType, reportArgumentType]
        metadata={"help": "Keep these processes from epoch to epoch. Default: true where there are any."},
    )
    verify_adapter: str = field(
        default="auto",
        metadata={
            "help": "auto loads the result in a fresh process and compares logits; off does not.",
            "choices": ["auto", "off"],
        },
    )

    def __post_init__(self) -> None:
        self._resolve_parts()
        self._resolve_learning_rates()
        self._resolve_precision()
        check_machine(self)
        resolve_batches(self)
        check_memory(self)
        self.resume_from_checkpoint = _RESUME_WORDS.get(
            (self.resume_from_checkpoint or "none").lower(), self.resume_from_checkpoint
        )
        self.deepspeed = load_deepspeed(self.deepspeed)
        check_deepspeed(self.deepspeed, self)
        if self.remove_unused_columns:
            # With true, transformers would drop our batch keys it cannot find in a wrapped forward.
            logger.warning("--remove_unused_columns true has no meaning here and is set to false")
            self.remove_unused_columns = False
        if self.ddp_find_unused_parameters is None:
            # Every part runs in every micro-batch (text-only ones run a dummy image), so nothing is ever unused.
            self.ddp_find_unused_parameters = False
        if self.deepspeed:
            from finetune.distributed import prepare_deepspeed_on_cpu, prepare_lone_process

            if self.use_cpu:
                prepare_deepspeed_on_cpu()
            else:  # transformers connects the processes as soon as it sees the flags
                prepare_lone_process()
            check_zero(self.deepspeed)
        hand_over(self)
        super().__post_init__()

    def _resolve_parts(self) -> None:
        if self.use_lora and self.tune_llm:
            raise ArgumentError(
                "--use_lora true trains adapters in the LLM, --tune_llm true trains the LLM in full: "
                "choose one (LoRA wants --tune_llm false)"
            )
        if self.tune_llm_layers is not None and (self.use_lora or self.tune_llm is False or not self.tune_llm_layers):
            raise ArgumentError(
                f"--tune_llm_layers {self.tune_llm_layers} trains so many layers of the LLM in full: it goes neither "
                "with --use_lora true (adapters) nor with --tune_llm false (nothing there), nor with 0"
            )
        self.tune_llm = (not self.use_lora) if self.tune_llm is None else self.tune_llm
        self.tune_vision = (not self.use_lora) if self.tune_vision is None else self.tune_vision
        adapted = set(self.lora_parts) if self.use_lora else set()
        self.tune_resampler = "resampler" not in adapted if self.tune_resampler is None else self.tune_resampler
        for part in sorted(adapted - {"llm"}):
            if getattr(self, f"tune_{part}"):
                raise ArgumentError(
                    f"--lora_parts {part} trains adapters in the {part} part, --tune_{part} true trains it in full: "
                    "choose one"
                )
        if not (self.use_lora or self.tune_llm or self._towers()):
            raise ArgumentError(
                "nothing would be trained: set at least one of --use_lora, --tune_llm, --tune_vision, "
                "--tune_resampler to true"
            )
        if not self.use_lora and not self.tune_llm:
            logger.warning("--tune_llm false without LoRA: the LLM stays as it is, only %s is trained", self._towers())

    def _towers(self) -> str:
        return " and ".join(part for part in ("vision", "resampler", "audio") if getattr(self, f"tune_{part}"))

    def _resolve_learning_rates(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.use_lora else 1e-5
        if self.use_lora and self.learning_rate < LOW_LORA_LEARNING_RATE:
            logger.warning(
                "--learning_rate %g is low for LoRA: adapters start at zero and usually want 1e-4 to 2e-4; "
                "below %g training often has no visible effect",
                self.learning_rate,
                LOW_LORA_LEARNING_RATE,
            )
        for part, share in (("vision", 5), ("resampler", 1), ("audio", 5)):
            name = f"{part}_lr"
            adapted = self.use_lora and part in self.lora_parts
            if getattr(self, name) is None:
                setattr(self, name, self.learning_rate if adapted else self.learning_rate / share)
            elif not adapted and not getattr(self, f"tune_{part}"):
                logger.warning("--%s has no effect: the %s is frozen (--tune_%s false)", name, part, part)

    def _resolve_precision(self) -> None:
        if self.bf16 and self.fp16:
            raise ArgumentError("--bf16 true and --fp16 true: choose one (bf16 where the GPU has it)")
        if self.use_cpu or not is_torch_cuda_available():
            self.use_cpu = True
            self.dataloader_pin_memory = False
            if self.fp16:
                logger.warning("no GPU: --fp16 is ignored, training runs in fp32 on the CPU")
            elif not self.bf16:
                logger.warning("no GPU found: training runs in fp32 on the CPU")
            self.bf16, self.fp16 = bool(self.bf16), False
        elif self.bf16 is None and self.fp16 is None:
            self.bf16 = is_torch_bf16_gpu_available()
            self.fp16 = not self.bf16
        else:
            self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)

    @property
    def compute_dtype(self) -> str:
        """The type the network computes in: "bfloat16", "float16" or "float32"."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def part_learning_rates(self) -> dict[str, float]:
        """Learning rate of each part, whether it is trained or not."""
        assert self.learning_rate is not None
        rates = {part: getattr(self, f"{part}_lr") for part in ("vision", "resampler", "audio")}
        return {"llm": self.learning_rate, **rates}


GROUPS = (ModelArguments, DataArguments, TrainingArguments, LoraArguments)


def flags_of(groups: Sequence[Any]) -> dict[str, bool]:
    """The flags of some dataclasses, and whether they take several words."""
    return {entry.name: "list" in str(entry.type) for group in groups for entry in fields(group)}


class Arguments(NamedTuple):
    """All parsed and validated flags."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    lora: LoraArguments
    origins: Mapping[str, str] = {}
    """Where each flag was given; flags that are missing here have their default, or follow from others."""

    def non_defaults(self) -> dict[str, Any]:
        """Every flag whose resolved value differs from its default, by name, in plain YAML types."""
        values: dict[str, Any] = {}
        for group in (self.model, self.data, self.training, self.lora):
            for entry in fields(group):
                value = getattr(group, entry.name)
                if value != entry.default and value not in (None, [], "") and entry.name not in _NOT_RECORDED:
                    values[entry.name] = _plain(value)
        return values

    def origin(self, name: str) -> str:
        """Where the value of a flag comes from."""
        return self.origins.get(name, "derived")

    def describe(self) -> str:
        """The flags that differ from their defaults, one on each line, with their origins."""
        values = self.non_defaults()
        width = max(map(len, values), default=0)
        lines = [f"  {name:<{width}}  {_short(value)}  ({self.origin(name)})" for name, value in values.items()]
        return "\n".join(["flags that are not at their defaults:", *lines])

    def to_yaml(self) -> str:
        """The same as YAML that a run takes again; what follows from other flags and the machine is in comments."""
        lines = []
        for name, value in self.non_defaults().items():
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=sys.maxsize)
            remark = "" if name in self.origins else "# "
            lines.append(f"  {remark}{name}: {text.removesuffix(_DOCUMENT_END).strip()}  # {self.origin(name)}")
        return "\n".join(["flags:", *lines, ""])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Parses and validates the command line, which may begin with a YAML file of flags.

    Raises:
        ArgumentError: unknown or contradicting flags.
    """
    known = flags_of(GROUPS)
    resolved = resolve(sys.argv[1:] if argv is None else argv, known)
    model, data, training, lora = _groups(resolved, known)
    if "do_train" in resolved.origins and not training.do_train:
        raise ArgumentError(
            f"{resolved.origins['do_train']} false: this trains; `python -m finetune evaluate` evaluates"
        )
    if training.do_predict:
        raise ArgumentError("--do_predict true is not training: `python -m finetune evaluate` predicts and scores")
    check_training(training)
    resolve_attention(model)
    if data.image_backend == "fast" and importlib.util.find_spec("simplejpeg") is None:
        logger.warning("--image_backend fast decodes JPEG files faster with simplejpeg: pip install -e '.[fast]'")
    if lora.q_lora:
        check_q_lora(training)
    check_lora(lora, use_lora=training.use_lora)
    check_targets(lora)
    check_data(data, training)
    if data.streaming:
        check_streamed_batches(training)
    return Arguments(model, data, training, lora, resolved.origins)


class _Parser(HfArgumentParser):
    """One line instead of the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message}; --help lists every flag")


def _groups(resolved: Resolved, known: Mapping[str, bool]) -> tuple[Any, ...]:
    """The flags as their dataclasses; every number is looked at before the first of them is made.

    Raises:
        ArgumentError: also for what transformers says of its own flags.
    """
    parser = _Parser(GROUPS, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    check_given(resolved.words)
    values, unknown = parser.parse_known_args(resolved.words)
    if unknown:
        refuse_unknown(unknown, [f"--{name}" for name in known])
    check_ranges(vars(values), resolved.origins)
    check_objects(vars(values))
    try:
        return parser.parse_args_into_dataclasses(resolved.words)
    except UserError:
        raise
    except (ValueError, ImportError, NotImplementedError) as error:
        raise ArgumentError(" ".join(str(error).split())) from error


def refuse_unknown(words: Sequence[str], known: Sequence[str]) -> NoReturn:
    """Refuses what no flag takes.

    Args:
        words: flags, perhaps with their values, or words that stand alone.
        known: all flags.

    Raises:
        ArgumentError: with the nearest known flag.
    """
    names = [word for word in words if word.startswith("--")] or words
    hints = []
    for name in names:
        close = difflib.get_close_matches(name.partition("=")[0], known, n=1)
        hints.append(f"{name} (did you mean {close[0]}?)" if close else name)
    raise ArgumentError(f"unknown: {', '.join(hints)}; --help lists every flag")
