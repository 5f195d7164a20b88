"""User errors, shown as one message without a traceback; and filters for warnings that a user cannot act on."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from finetune.utils.quoting import plain


class UserError(ValueError):
    """Invalid input of the user. The message says what disagrees and what to do.

    Control characters from files and records are escaped in the message, so that it cannot control the terminal.

    Attributes:
        exit_code: exit status of the process, one of ``finetune.runtime.outcome``.
        location: what is being read ("FILE, record 3"), in front of the message; added by ``located``.
    """

    exit_code = 2
    location = ""

    def __init__(self, message: str = "") -> None:
        super().__init__(plain(message))

    def __str__(self) -> str:
        return f"{self.location}: {super().__str__()}" if self.location else super().__str__()


@contextmanager
def located(location: object) -> Iterator[None]:
    """Adds the location to user errors raised inside, unless they have one.

    Readers and the encoder use it once per record, so that no function below them needs to know file and record.

    >>> with located("train.json, record 3"):
    ...     raise UserError("turn 0 has no text")
    Traceback (most recent call last):
        ...
    finetune.utils.errors.UserError: train.json, record 3: turn 0 has no text
    """
    try:
        yield
    except UserError as error:
        error.location = error.location or str(location)
        raise


class CheckpointError(UserError):
    """A model folder that cannot be used: files or weights are missing, surplus or of another shape."""


class ArgumentError(UserError):
    """Flags that contradict each other, the checkpoint or the machine."""


class UnusableResultError(UserError):
    """A run without a usable result: nothing was trained, weights are not finite, or too much data was skipped."""

    exit_code = 4


class NotSavedError(UserError):
    """An output of the run could not be written."""

    exit_code = 5  # NOT_SAVED


# Warnings by the beginning of their message.
_WARNINGS = (
    # names that libraries use among themselves
    "`is_gradient_checkpointing` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is dep",
    # pydantic, on the models of other packages
    r"Field .* has conflict with protected namespace",
    r"Field name .* shadows an attribute in parent",
    r"The '\w+' attribute with value .* was provided to the `Field\(\)` function",
    # pandas, on optional packages
    r"Pandas requires version .* of '(numexpr|bottleneck)'",
    # torch.distributed: DeepSpeed and accelerate choose the device before they create the process group
    r"No device id is provided via `init_process_group`",
    r"barrier\(\): using the device under current context",
)
# Logger -> beginnings of its messages.
_MESSAGES = {
    # 4-bit matrix products on the CPU; --q_lora needs a GPU
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # The Trainer always leaves accelerate's plugin at 1; a value that contradicts the flag is an error of transformers.
    "accelerate.accelerator": ("Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1,",),
    "transformers.trainer_utils": (
        # the checkpoint's own tokenizer beside the checkpoint's own config.json
        "The tokenizer has new PAD/BOS/EOS tokens",
        # three flags and the batch of a resumed run; checkpoints/resume_rules.py compares all of them
        "Warning: The following arguments do not match the ones in the `trainer_state.json`",
    ),
    # torchrun's default of one thread per process, which suits training: dataloader workers prepare the data
    "torch.distributed.run": ("\n*****************************************\nSetting OMP_NUM_THREADS",),
    # INFO messages on how many threads it uses
    "numexpr.utils": ("NumExpr ", "Note: NumExpr "),
}
_KERNELS = "transformers.integrations.hub_kernels"
_FALLBACK = "is falling back to its reference PyTorch implementation"


def silence_unactionable_warnings() -> None:
    """Drops warnings and log messages of other libraries that a user cannot act on; all others are shown.

    Call it before those libraries are imported where possible; calling it again changes nothing.
    """
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # Pillow's remarks about single files: they name none of them. What cannot be decoded is an error of ours, and so is
    # an image above --max_image_pixels.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for name in (*_MESSAGES, _KERNELS):
        logging.getLogger(name).addFilter(_is_actionable)  # a filter is added only once


def _is_actionable(record: logging.LogRecord) -> bool:
    message, rank = record.getMessage(), os.environ.get("RANK", "0")
    if record.name == _KERNELS and _FALLBACK in message:  # the packages it names have CUDA kernels
        torch = sys.modules.get("torch")
        return rank == "0" and torch is not None and torch.cuda.is_available()
    return not message.removeprefix(f"[RANK {rank}] ").startswith(_MESSAGES.get(record.name, ()))
