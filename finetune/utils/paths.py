"""Expansion of ``~`` in paths, also on machines where the user has no home folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from finetune.utils.errors import ArgumentError


def home() -> Path | None:
    """The home folder; None without HOME and without an entry in the password file, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expand(path: str | Path) -> Path:
    """A path whose leading ~ is the home folder.

    Raises:
        ArgumentError: it begins with ~, and there is no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ArgumentError(f"{path}: there is no home folder for ~; set HOME, or write the whole path") from error


def did_you_mean(missing: Path) -> str:
    """A hint with the name beside a missing file that is most like it; empty where there is none."""
    beside = [path.name for path in missing.parent.iterdir()] if missing.parent.is_dir() else []
    close = difflib.get_close_matches(missing.name, beside, n=1)
    return f" (did you mean {missing.with_name(close[0])}?)" if close else ""
