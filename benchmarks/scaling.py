"""Scaling from one rank to two on the CPU, DDP, ZeRO-2 and ZeRO-3: ``python benchmarks/scaling.py``.

A small MiniCPM-V 4.5 of random weights is trained by finetune.py under torchrun on made-up pictures, one thread per
rank and the same samples per rank and step. Counted are samples per second of CPU time of a rank, times the ranks: the
speed on cores that do nothing else, if no rank ever waited for another. So neighbours do not count, and 2 is the most
that two ranks reach; below it is what they spend on each other. The median of the steps behind the first ones counts.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import append

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
WAYS = {"DDP": "none", "ZeRO-2": "ds_config_zero2.json", "ZeRO-3": "ds_config_zero3.json"}
_STEPS, _LEFT_OUT, _BATCH = 12, 4, 4


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the rates and appends them to results.csv."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1, help="runs of every way, of which the best counts")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given, flags = parser.parse_known_args(argv)
    if given.rank is not None:
        _train(given.rank, flags)
        return
    rates: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        base, data = _prepare(Path(place))
        for _ in range(given.rounds):
            for way in given.ways:
                for ranks in (1, 2):
                    rates.setdefault((way, ranks), []).append(_rate(Path(place), base, data, way, ranks))
    rows = []
    for way in given.ways:
        one, two = (max(rates[way, ranks]) for ranks in (1, 2))
        print(f"{way:<8} 1 rank {one:8.2f}   2 ranks {two:8.2f} samples/s of CPU   {two / one:.2f}")
        rows.append((way, two, one, two / one, "samples/s of CPU time, 2 ranks / 1 rank"))
    if not given.dry:
        append("scaling", rows, ["torch", "transformers", "deepspeed", "accelerate"])


def _prepare(place: Path) -> tuple[Path, Path]:
    """A checkpoint and a data set."""
    import torch
    from transformers import AutoConfig

    from finetune.models.loading import MODEL_CLASSES
    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
    from finetune.tiny.demo_dataset import write_demo_dataset

    base = write_tiny_checkpoint("v4_5", place / "base")
    settings = json.loads((base / "config.json").read_text()) | SIZES
    (base / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base)
    network: Any = MODEL_CLASSES[config.model_type](config)
    for path in base.glob("*.safetensors"):
        path.unlink()
    kept = (base / "config.json").read_bytes()
    network.save_pretrained(str(base))
    (base / "config.json").write_bytes(kept)
    return base, write_demo_dataset(place / "data", train=2 * _STEPS * _BATCH, eval=1) / "train.json"


def _rate(place: Path, base: Path, data: Path, way: str, ranks: int) -> float:
    """Samples per second of a run."""
    output = place / "out"
    flags = {
        "model_name_or_path": base,
        "data_path": data,
        "output_dir": output,
        "overwrite_output_dir": "true",
        "deepspeed": WAYS[way] if WAYS[way] == "none" else ROOT / WAYS[way],
        "max_steps": _STEPS,
        "per_device_train_batch_size": _BATCH,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "verify_adapter": "off",
        "check": "off",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["--", str(Path(__file__)), "--rank", str(place)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}, {ranks} ranks: {done.stderr[-3000:]}")
    marks = [json.loads((place / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    steps = [[after - before for before, after in zip(own, own[1:], strict=False)][_LEFT_OUT:] for own in marks]
    found = ranks * _BATCH / statistics.median(sum(step) / ranks for step in zip(*steps, strict=True))
    print(f"{way}, {ranks} ranks: {found:.2f} samples/s of CPU", flush=True)
    return found


def _train(place: Path, flags: list[str]) -> None:
    """finetune.py as one rank, with the CPU time of its process noted at every line of the log."""
    from trainer import CPMTrainer

    marks: list[float] = []
    log = CPMTrainer.log

    def noted(self: CPMTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        log(self, logs, start_time)
        if "loss" in logs:
            marks.append(time.process_time())

    CPMTrainer.log = noted
    sys.argv = [str(ROOT / "finetune.py"), *flags]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        (place / f"rank{os.environ['RANK']}.json").write_text(json.dumps(marks))


if __name__ == "__main__":
    main()
