"""What is the user's to mend, shown as one message without a traceback; and what nobody can mend, not shown."""

import warnings

from finetune.utils.quoting import plain


class UserError(ValueError):
    """Something given by the user cannot be used. The message says what disagrees and what to do.

    What files and records put into a message is shown with control characters escaped: no message steers a terminal.

    Attributes:
        exit_code: with which the process ends, one of ``finetune.runtime.outcome``.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(plain(message))


class CheckpointError(UserError):
    """A model folder that cannot be used: files or weights are missing, surplus or of another shape."""


class ArgumentError(UserError):
    """Flags that contradict each other, the checkpoint or the machine."""


class WorthlessError(UserError):
    """A run whose result nobody could use: nothing was trained, weights are not finite, too much data was left out."""

    exit_code = 4


class NotSavedError(UserError):
    """Something that the run should leave could not be written."""

    exit_code = 5  # NOT_SAVED


def ignore_what_nobody_can_mend() -> None:
    """Keeps warnings from the screen that no user could do anything about."""
    # Old names that libraries use among themselves.
    for message in ("`is_gradient_checkpointing` is deprecated", "`torch.distributed.all_gather_into_tensor` is dep"):
        warnings.filterwarnings("ignore", message=message)
    # Pillow's remarks about single files: they name none of them. What cannot be decoded is an error of ours, and so is
    # a picture above --max_image_pixels.
    warnings.filterwarnings("ignore", module=r"PIL\.")
