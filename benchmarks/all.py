"""Runs every benchmark of the performance table one after another and writes the tables: ``python benchmarks/all.py``.

Each adds its figures to results.csv. It takes an hour or so on two cores and wants the machine for itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from table import GOALS

FOLDER = Path(__file__).resolve().parent
_OFFICIAL, _OTHER = ("samples", "end_to_end"), "llamafactory_samples"


def main() -> int:
    """Prints what each run prints; 1 when one of them failed or missed its goal."""
    known = [*dict.fromkeys(goal.benchmark for goal in GOALS), "scaling"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of: {', '.join(known)}")
    parser.add_argument(
        "--official", metavar="DIR", help="the vendor's finetune folder: its own samples are measured too"
    )
    parser.add_argument(
        "--llamafactory", nargs=2, metavar=("PYTHON", "FILE"), help="what llamafactory_samples.py takes; it is run then"
    )
    given = parser.parse_args()
    if unknown := set(given.names) - set(known):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    runs = [(name, []) for name in given.names or known if name != _OTHER]
    if given.official:
        runs += [(name, ["--official", given.official]) for name in _OFFICIAL if name in (given.names or known)]
    if given.llamafactory:
        runs.append((_OTHER, given.llamafactory))
    codes: dict[str, int | None] = {}
    for name, options in runs:
        script = FOLDER / f"{name}.py"
        print(f"== {' '.join([name, *options])}", flush=True)
        command = [sys.executable, str(script), *options]
        codes[name] = subprocess.run(command, check=False).returncode if script.is_file() else None
    for writer in ("table.py", "scaling_model.py"):
        subprocess.run([sys.executable, str(FOLDER / writer)], check=True)
    for name, code in codes.items():
        print(
            f"{name:<16} {'not there' if code is None else 'ok' if code == 0 else f'failed or missed a goal ({code})'}"
        )
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
