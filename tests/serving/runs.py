"""Runs the commands of the package."""

from __future__ import annotations

import subprocess
import sys

import servers


def command(*words: object) -> str:
    """Runs ``python -m finetune`` and gives what it prints."""
    argv = [sys.executable, "-m", "finetune", *map(str, words)]
    done = subprocess.run(argv, cwd=servers.ROOT, capture_output=True, text=True, check=False)
    # 3: a comparison that found differences, which the tests look at.
    assert done.returncode in (0, 3), f"{' '.join(argv)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
