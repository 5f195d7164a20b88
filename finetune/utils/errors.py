"""User errors: one message without a traceback, and an exit code; filters for warnings of libraries."""

import warnings

from finetune.utils.quoting import plain


class UserError(ValueError):
    """Invalid input of the user. The message says what disagrees and what to do.

    Control characters in it are escaped: text of files and records cannot send escape sequences to a terminal.

    Attributes:
        exit_code: exit status of the process, one of ``finetune.runtime.outcome``.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(plain(message))


class CheckpointError(UserError):
    """A model folder that cannot be used: files or weights are missing, surplus or of another shape."""


class ArgumentError(UserError):
    """Flags that contradict each other, the checkpoint or the machine."""


class UnusableResultError(UserError):
    """The result of a run is unusable: nothing was trained, weights are not finite, too many samples were skipped."""

    exit_code = 4


class NotSavedError(UserError):
    """A checkpoint, result or file of the run could not be written."""

    exit_code = 5  # NOT_SAVED


def ignore_library_warnings() -> None:
    """Filters warnings of libraries that a user cannot act on."""
    # Deprecated names that libraries use among themselves.
    for message in ("`is_gradient_checkpointing` is deprecated", "`torch.distributed.all_gather_into_tensor` is dep"):
        warnings.filterwarnings("ignore", message=message)
    # Pillow's warnings about single files do not name the file. What cannot be decoded, and an image above
    # --max_image_pixels, are errors of this package.
    warnings.filterwarnings("ignore", module=r"PIL\.")
