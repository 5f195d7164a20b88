"""Folders of which single files are replaced."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path


def linked(folder: Path, target: Path) -> Path:
    """A copy of a folder whose files are the same on the disk; ``put`` replaces single ones."""
    return Path(shutil.copytree(folder, target, copy_function=os.link))


def put(path: Path, content: bytes | str | object) -> None:
    """Replaces a file; what is neither bytes nor text is written as JSON."""
    path.unlink(missing_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
