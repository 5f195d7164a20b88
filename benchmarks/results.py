"""Reads and writes results.csv: one row per measured case, with versions, hardware and commit."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).resolve().parent / "results.csv"
COLUMNS = ("date", "benchmark", "case", "ours", "theirs", "ratio", "unit", "versions", "hardware", "commit")

Row = tuple[str, float, float, float, str]
"""Case, our figure, the other one, their ratio, unit."""
OFFICIAL = "the vendor's dataset class"
"""Added to the name of a case where the other side's samples come from the vendor's own code (--official)."""


def append(benchmark: str, rows: Iterable[Row], packages: Sequence[str], hardware: str | None = None) -> None:
    """Adds rows to results.csv.

    Args:
        benchmark: name of the benchmark.
        rows: what it measured.
        packages: their versions are noted, with that of Python.
        hardware: what it ran on; this machine's processor when None.
    """
    versions = " ".join([f"python={platform.python_version()}", *(f"{name}={version(name)}" for name in packages)])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = not FILE.exists()
    with FILE.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for case, ours, theirs, ratio, unit in rows:
            figures = [f"{figure:.4g}" for figure in (ours, theirs, ratio)]
            writer.writerow([today, benchmark, case, *figures, unit, versions, hardware or processor(), commit()])


def rows() -> list[dict[str, str]]:
    """The rows of results.csv, the oldest first; the first ones name the commit that added them."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, restval=""))


def commit(folder: Path = FILE.parent) -> str:
    """The commit of the code that runs, with a plus where it is changed; empty outside of a repository."""
    known = _git(folder, "rev-parse", "--short=7", "HEAD")
    changed = known and _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
    return f"{known}+" if changed else known


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout.strip()


def processor() -> str:
    """Name and usable cores of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores, {name}"
