"""Runs both launchers repeatedly and counts exit codes: ``python benchmarks/repeat_launchers.py --runs 20``.

Distributed programs that abort at exit in one run of ten are found here, not by a single test.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--max_steps 2 --gradient_accumulation_steps 1 --save_strategy no --overwrite_output_dir true"


def main() -> int:
    """Prints one line per run and the counts; 1 when any run did not exit with 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="runs in all, LoRA and full in turn, both families")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
    from finetune.tiny.demo_dataset import write_demo_dataset

    codes: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as place:
        data = write_demo_dataset(Path(place) / "data", train=16, eval=4)
        models = [write_tiny_checkpoint(family, Path(place) / family) for family in ("llama3_v2_5", "v2_0")]
        for run in range(args.runs):
            script = ("finetune_lora.sh", "finetune_ds.sh")[run % 2]
            environment = {
                **os.environ,
                "MODEL": str(models[run // 2 % 2]),
                "DATA": str(data / "train.json"),
                "EVAL_DATA": str(data / "eval.json"),
                "OUTPUT_DIR": str(Path(place) / script),
                "DS_CONFIG": ("ds_config_zero2.json", "ds_config_zero3.json")[run // 4 % 2],
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            }
            start = time.perf_counter()
            done = subprocess.run(
                ["sh", str(ROOT / script), *FLAGS.split()], env=environment, capture_output=True, text=True, check=False
            )
            codes[done.returncode] += 1
            last = (done.stdout.strip().splitlines() or [""])[-1]
            print(f"run {run + 1}: {script} exit {done.returncode} in {time.perf_counter() - start:.1f} s", flush=True)
            if done.returncode:
                print(last, done.stderr[-2000:])
    print("exit codes: " + ", ".join(f"{code} x {count}" for code, count in sorted(codes.items())))
    return 0 if set(codes) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
