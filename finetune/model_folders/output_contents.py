"""Which output folders a new run may write to, by their contents; no torch, so that launchers can ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.utils.errors import UserError

STATE_FOLDER = ".finetune"
"""Folder in OUTPUT_DIR with the lock of the run that writes there, and the list of what runs have written."""
RUN_FILE = "run.yaml"
"""File with the resolved flags and versions of a run."""
LOGS = "runs"
"""Folder of the trackers that write files."""

# Left by a run that saved nothing; a folder with only these may be used again.
_REUSABLE = (STATE_FOLDER, RUN_FILE, LOGS)


class OutputError(UserError):
    """An output folder that must not be written to."""


def check_unused(folder: Path) -> None:
    """Refuses an output folder that has contents, for a run that neither resumes nor overwrites.

    Raises:
        OutputError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"OUTPUT_DIR {folder} is a file; give a folder")
    if folder.is_dir() and any(path.name not in _REUSABLE for path in folder.iterdir()):
        raise OutputError(
            f"OUTPUT_DIR {folder} is not empty: choose another, continue its run with --resume_from_checkpoint auto, "
            "or replace it with --overwrite_output_dir true"
        )


@contextmanager
def as_output_error(folder: Path) -> Iterator[None]:
    """Turns an error of the file system into one of the output folder.

    Raises:
        OutputError: with the error and what to do.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"OUTPUT_DIR {folder} cannot be used: {error.strerror or error} ({error.filename}). Choose another folder, "
            "or correct its permissions or free disk space"
        ) from error
