"""Training flags (a subclass of transformers.TrainingArguments) and the defaults derived from other flags."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import transformers
from transformers.utils.import_utils import (
    is_torch_bf16_gpu_available,
    is_torch_cuda_available,
    is_torch_tf32_available,
)

from finetune.arguments.activation_checkpointing import copy_to_new_names
from finetune.arguments.deepspeed import check_deepspeed, check_zero, load_deepspeed
from finetune.arguments.flag_rules import check_method, resume_choice
from finetune.arguments.model import MemoryArguments, check_memory
from finetune.arguments.preference import PreferenceArguments
from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)

# Lower learning rates hardly train LoRA: adapters start at zero, and most published failures used 1e-6.
LOW_LORA_LEARNING_RATE = 1e-5

# Older scripts pass true and false.
PACKINGS = {"off": "off", "batch": "batch", "best_fit": "best_fit", "true": "best_fit", "false": "off"}
BY_SIZE = ("group_by_length", "batch_rebalance")
"""Values of train_sampling_strategy that need the lengths of the samples."""


@dataclass
class BatchArguments:
    """Packing of samples into rows; part of the training flags."""

    packing: str = field(
        default="off",
        metadata={
            "help": "Concatenate samples in one row without padding; they do not attend to each other. batch: every "
            "optimizer step has the same samples as without packing, balanced over the GPUs. best_fit: rows are "
            "filled up to packing_tokens, so a step has more samples. off: rows are padded. "
            "true and false mean best_fit and off."
        },
    )
    packing_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum length of a packed row in tokens. Default: per_device_train_batch_size x model_max_length."
        },
    )
    packing_items: int | None = field(
        default=None,
        metadata={"help": "Maximum number of images, slices and frames per row of best_fit. Default: no limit."},
    )


@dataclass
class EndingArguments:
    """Timeouts of stopping by a signal and of hanging runs; part of the training flags."""

    save_on_signal_timeout: float = field(
        default=25.0,
        metadata={
            "help": "Seconds to finish the step and save a checkpoint after SIGTERM, SIGUSR1 or SIGHUP; 0 ends the run "
            "at once, without saving. The scheduler's notice should be longer than that."
        },
    )
    hang_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "Seconds without a finished micro-batch, evaluation batch or save after which every rank writes "
            "its stack traces and the samples of the step into OUTPUT_DIR/hang and the run ends; 0: never."
        },
    )


@dataclass
class TrainingArguments(
    MemoryArguments, BatchArguments, EndingArguments, PreferenceArguments, transformers.TrainingArguments
):
    """transformers.TrainingArguments with other defaults, and the flags of the official scripts."""

    output_dir: str | None = field(default="output", metadata={"help": "Folder of checkpoints and the result."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Use a non-empty output folder; a previous result in it is removed."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "auto resumes from the newest complete checkpoint in output_dir, or starts a new run if there is "
            "none; a checkpoint-N folder resumes from that one; none (default) always starts a new run."
        },
    )
    model_max_length: int = field(
        default=2048, metadata={"help": "Maximum length of a sample in tokens, with image tokens."}
    )
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
            "help": "Train only the last N layers of the LLM (a negative number: the first N), in full, without "
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
        metadata={"help": "Learning rate of the vision tower. Default: learning_rate / 5; learning_rate for LoRA."},
    )
    resampler_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the resampler. Default: learning_rate."}
    )
    audio_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the audio tower. Default: as vision_lr."}
    )
    bf16: bool = field(
        default=None,  # pyright: ignore[reportAssignmentType, reportArgumentType]
        metadata={"help": "Default: true if the GPU supports it."},
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
        metadata={
            "help": "Number of evaluation samples answered by generation at every evaluation, scored by eval_metric."
        },
    )
    eval_metric: str = field(
        default="auto",
        metadata={"help": "Metric of eval_generate, logged as eval_<metric>; a name or a function as in evaluate."},
    )
    eval_max_new_tokens: int = field(
        default=64, metadata={"help": "Maximum length of the answers of eval_generate, in tokens."}
    )
    eval_generate_zero3: bool = field(
        default=False,
        metadata={"help": "Enable eval_generate with ZeRO-3: correct, but slow, as every token gathers all weights."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every N steps (below 1: share of all steps)."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "No effect: NaN is logged as NaN."})
    max_nonfinite_steps: int = field(
        default=3, metadata={"help": "Stop after N consecutive steps with non-finite loss or gradient; 0: never."}
    )
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Loggers; none for off."})
    dataloader_num_workers: int = field(default=2, metadata={"help": "Dataloader workers per rank."})
    dataloader_persistent_workers: bool = field(
        default=None,  # pyright: ignore[reportAssignmentType, reportArgumentType]
        metadata={"help": "Keep dataloader workers between epochs. Default: true if there are any."},
    )
    verify_adapter: str = field(
        default="auto",
        metadata={
            "help": "auto loads the result in a fresh process and compares logits; off does not.",
            "choices": ["auto", "off"],
        },
    )

    def __post_init__(self) -> None:
        check_method(vars(self))
        self._resolve_parts()
        self._resolve_learning_rates()
        self._resolve_precision()
        resolve_batches(self)
        check_memory(self)
        self.resume_from_checkpoint = resume_choice(self.resume_from_checkpoint)
        self.deepspeed = load_deepspeed(self.deepspeed)
        check_deepspeed(self.deepspeed, self)
        if self.remove_unused_columns:
            # With true, transformers would drop batch keys that it does not find in a wrapped forward.
            logger.warning("--remove_unused_columns true is not supported and is set to false")
            self.remove_unused_columns = False
        if self.ddp_find_unused_parameters is None:
            # Every part runs in every micro-batch (text-only ones run a dummy image): no parameter is unused.
            self.ddp_find_unused_parameters = False
        if self.deepspeed:
            from finetune.runtime.distributed import prepare_deepspeed_on_cpu, prepare_single_process

            if self.use_cpu:
                prepare_deepspeed_on_cpu()
            else:  # transformers initialises the process group in its __post_init__
                prepare_single_process()
            check_zero(self.deepspeed)
        copy_to_new_names(self)
        super().__post_init__()

    def _resolve_parts(self) -> None:
        if self.tune_llm_layers is not None and (self.use_lora or self.tune_llm is False or not self.tune_llm_layers):
            raise ArgumentError(
                f"--tune_llm_layers {self.tune_llm_layers} trains that many layers of the LLM in full: it cannot be 0 "
                "or combined with --use_lora true (adapters) or --tune_llm false (frozen LLM)"
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
            logger.warning("--tune_llm false without LoRA: the LLM is frozen, only %s is trained", self._towers())

    def _towers(self) -> str:
        return " and ".join(part for part in ("vision", "resampler", "audio") if getattr(self, f"tune_{part}"))

    def _resolve_learning_rates(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.use_lora else 1e-5
        for part, share in (("vision", 5), ("resampler", 1), ("audio", 5)):
            name = f"{part}_lr"
            adapted = self.use_lora and part in self.lora_parts
            if getattr(self, name) is None:
                setattr(self, name, self.learning_rate if adapted else self.learning_rate / share)
            elif not adapted and not getattr(self, f"tune_{part}"):
                logger.warning("--%s has no effect: the %s is frozen (--tune_%s false)", name, part, part)

    def _resolve_precision(self) -> None:
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
        if self.tf32 and (self.use_cpu or not is_torch_tf32_available()):  # before transformers says so in its way
            raise ArgumentError("--tf32 true needs an NVIDIA GPU of the Ampere generation or newer; omit it")

    @property
    def compute_dtype(self) -> str:
        """The compute dtype: "bfloat16", "float16" or "float32"."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def part_learning_rates(self) -> dict[str, float]:
        """Learning rate of each part, whether it is trained or not."""
        assert self.learning_rate is not None
        rates = {part: getattr(self, f"{part}_lr") for part in ("vision", "resampler", "audio")}
        return {"llm": self.learning_rate, **rates}


def warn_of_low_rate(training: TrainingArguments) -> None:
    """Warns of a learning rate with which adapters hardly learn answers; preference training takes lower ones."""
    if training.use_lora and training.learning_rate < LOW_LORA_LEARNING_RATE:
        logger.warning(
            "--learning_rate %g is low for LoRA: adapters start at zero and usually need 1e-4 to 2e-4; "
            "below %g training often has no visible effect",
            training.learning_rate,
            LOW_LORA_LEARNING_RATE,
        )


def resolve_batches(training: TrainingArguments) -> None:
    """Sets defaults that depend on other flags; warns of flags without effect.

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
            f"--packing {training.packing} with --train_sampling_strategy {training.train_sampling_strategy}: "
            f"packed rows are ordered and balanced over the GPUs by themselves; use {' or '.join(orders)}"
        )
    if training.packing_tokens is not None and training.packing_tokens < training.model_max_length:
        logger.warning(
            "--packing_tokens %d is below --model_max_length %d: longer samples get a row of their own",
            training.packing_tokens,
            training.model_max_length,
        )


def row_capacity(training: TrainingArguments) -> int:
    """Maximum number of tokens of a packed row."""
    return training.packing_tokens or training.per_device_train_batch_size * training.model_max_length


def _idle(training: TrainingArguments) -> list[str]:
    """Flags that were given and have no effect with this packing."""
    if training.packing == "off":
        return [name for name in ("packing_tokens", "packing_items") if getattr(training, name) is not None]
    idle = ["dataloader_drop_last"] if training.dataloader_drop_last else []
    if training.packing == "batch" and training.packing_items is not None:
        idle.append("packing_items")
    return idle


def check_streamed_batches(training: TrainingArguments) -> None:
    """Refuses packing and length grouping for streamed data, whose lengths are unknown in advance.

    Raises:
        ArgumentError: such a flag is given.
    """
    if training.packing != "off" or training.train_sampling_strategy in BY_SIZE:
        raise ArgumentError(
            "--streaming true reads records in order: --packing and --train_sampling_strategy "
            f"{' or '.join(BY_SIZE)} need the lengths of all samples before training"
        )
