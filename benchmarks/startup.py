"""CPU time of short commands, against an older commit of this project: ``python benchmarks/startup.py``.

``--help``, ``check`` of 128 small records with nothing cached, one LoRA step of a tiny 2.6 with and without
verification, and finetune_lora.sh on two CPU processes. The CPU seconds of all processes of a command are counted, one
thread each; both sides in turn, the median of five. Figures go to benchmarks/results.csv.

The older commit does not train with transformers 5.24, whose generation it does not know. Both sides run with another
version in a folder of its own: ``pip install --no-deps --target DIR transformers==5.23.0``, then --packages DIR.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from results import Row, append

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BEFORE = "1cc6bf4"
_FLAGS = "--use_lora true --max_steps 1 --report_to none --overwrite_output_dir true --use_cpu true --output_dir {out}"
_STEP = "{python} finetune.py --model_name_or_path {base} --data_path {data} " + _FLAGS
# Name -> case in results.csv, command.
CASES = {
    "help": ("finetune.py --help", "{python} finetune.py --help"),
    "check": ("check of 128 small records", "{python} -m finetune check --model {base} --data {data}"),
    "step": ("one LoRA step, not verified", _STEP + " --verify_adapter off"),
    "verified": ("one LoRA step, verified", _STEP),
    "launcher": (
        "finetune_lora.sh, two CPU processes, one step, verified",
        f"sh finetune_lora.sh --warmup_steps 0 {_FLAGS}",  # warmed up, the first step would change nothing
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when one is not better than before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"only these of: {', '.join(CASES)}")
    parser.add_argument("--before", default=BEFORE, help="commit, or folder of a checkout (default: %(default)s)")
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="packages that both sides prefer to installed ones"
    )
    parser.add_argument("--runs", type=int, default=5, help="runs of either side (default: 5)")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    given = parser.parse_args(argv)
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
    from finetune.tiny.demo_dataset import write_demo_dataset

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, checkout(given.before) as before:
        folder = Path(name)
        base = write_tiny_checkpoint("v2_6", folder / "base")
        data = write_demo_dataset(folder / "data", train=128, eval=1) / "train.json"
        own = {"MODEL": str(base), "DATA": str(data), "PACKAGES": str(given.packages or "")}
        for chosen in given.cases or CASES:
            case, command = CASES[chosen]
            words = {"python": sys.executable, "base": str(base), "data": str(data), "out": str(folder / "out")}
            sides = [command.format(**words).split()] * 2
            figures = interleaved(sides, (ROOT, before), given.runs, folder, own)
            ours, theirs = map(statistics.median, figures)
            rows.append((f"CPU time, {case}", ours, theirs, theirs / ours, f"CPU s, {BEFORE} / now"))
            print(f"{rows[-1][0]:<70} {ours:>8.2f} {theirs:>8.2f} {theirs / ours:>6.2f}", flush=True)
    if not given.dry:
        append("startup", rows, ["torch", "transformers", "peft", "deepspeed"])
    return 0 if all(ratio > 1 for _, _, _, ratio, _ in rows) else 1


@contextmanager
def checkout(before: str) -> Iterator[Path]:
    """A folder with the other side: a given one, or a commit, which is checked out for a while."""
    if Path(before).is_dir():
        yield Path(before).resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), before], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def interleaved(
    commands: Sequence[Sequence[str]], sides: Sequence[Path], runs: int, folder: Path, more: Mapping[str, str]
) -> list[list[float]]:
    """CPU seconds of every run, by side; one run of each before is not counted, as it compiles and caches."""
    figures: list[list[float]] = [[] for _ in sides]
    for run in range(runs + 1):
        for command, side, found in zip(commands, sides, figures, strict=True):
            cache = folder / f"cache-{run}-{side.name}"  # nothing cached, except compiled code
            seconds = cpu_seconds(command, side, {**more, "XDG_CACHE_HOME": str(cache)})
            if run:
                found.append(seconds)
    return figures


def cpu_seconds(command: Sequence[str], side: Path, more: Mapping[str, str]) -> float:
    """CPU seconds of a command with all its processes.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    path = os.pathsep.join(filter(None, [str(side), more.get("PACKAGES")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=side, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
