"""Runs every benchmark of the performance table one after another and writes the tables: ``python benchmarks/all.py``.

Each adds its figures to results.csv. It takes an hour or so on two cores and wants the machine for itself. gpu.py is
left out where there is no GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from table import GOALS

FOLDER = Path(__file__).resolve().parent
_OFFICIAL, _OTHER = ("samples", "end_to_end"), "llamafactory_samples"
# Of the 8B network that is trained in full, 12 layers fit on 80 GB.
_GPU: list[list[str]] = [[], ["--memory"], ["--method", "full", "--layers", "12"]]


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
    parser.add_argument("--vendor", nargs=2, metavar=("PYTHON", "DIR"), help="what evaluation.py takes")
    given = parser.parse_args()
    if unknown := set(given.names) - set(known):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = given.names or known
    runs: list[tuple[str, list[str]]] = [(name, []) for name in wanted if name not in (_OTHER, "gpu")]
    if given.official:
        runs += [(name, ["--official", given.official]) for name in _OFFICIAL if name in wanted]
    runs += [("evaluation", ["--vendor", *given.vendor])] if given.vendor and "evaluation" in wanted else []
    runs += [("gpu", options) for options in _GPU if "gpu" in wanted and _has_gpu()]
    runs += [(_OTHER, given.llamafactory)] if given.llamafactory else []
    codes = {name: "left out" for name in wanted if name not in dict(runs)}
    for name, options in runs:
        words = " ".join([name, *options])
        print(f"== {words}", flush=True)
        done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *options], check=False)
        codes[words] = f"failed or missed a goal ({done.returncode})" if done.returncode else "ok"
    for writer in ("table.py", "scaling_model.py"):
        subprocess.run([sys.executable, str(FOLDER / writer)], check=True)
    for words, outcome in codes.items():
        print(f"{words:<40} {outcome}")
    return int(any(outcome not in ("ok", "left out") for outcome in codes.values()))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
