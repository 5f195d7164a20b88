"""A few seconds of ``make fuzz``, and what it does with an input that escapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent.parent / "fuzz.py"
# What needs no network is at work at once.
KINDS = ("bytes", "picture", "size", "sound", "video")


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(FUZZ.parent.parent)}
    command = [sys.executable, str(FUZZ), "--seed", "7", "--out", str(folder / "out"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_nothing_escapes(tmp_path: Path) -> None:
    ended = run(tmp_path, "--minutes", str(5 / 60), "--kinds", *KINDS)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert ", 0 escapes" in ended.stdout
    assert not (tmp_path / "out").exists()
