"""Worker of test_modes.py: trains several configurations, alone or as a rank; writes results-*.json to --out."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import warnings
from dataclasses import astuple
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning)
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from made_records import PER_RANK, STEPS  # noqa: E402
from stack import EXPERTS, FAMILIES, KINDS, PAIRED, build, flags, steps, unwrapped  # noqa: E402
from variants import MIXTURE  # noqa: E402

from finetune.runtime.outcome import exit_after_handlers  # noqa: E402

ROOT = HERE.parents[1]
MODES = ("ddp", "zero2", "zero3", "zero3-0")
PACKED = "-packed"
SHORT = 8
BRIEF = 4


def deepspeed_configs(folder: Path) -> dict[str, str]:
    """DeepSpeed configuration by mode: the shipped ones, and ZeRO-3 that partitions every weight, however small."""
    zero3 = json.loads((ROOT / "ds_config_zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    everything = folder / "zero3-0.json"
    everything.write_text(json.dumps(zero3))
    shipped = {stage: str(ROOT / f"ds_config_{stage}.json") for stage in ("zero2", "zero3")}
    return {**shipped, "zero3-0": str(everything)}


def run(base: Path, data: Path, output: Path, *more: str) -> dict:
    """Trains, evaluates and saves; what the log says."""
    start = time.perf_counter()
    trainer = build(flags(base, data, output, *more))
    from deepspeed.utils import get_z3_leaf_modules  # not before the flags have told it that there is no GPU

    partitioned = sum(hasattr(parameter, "ds_shape") for parameter in unwrapped(trainer).parameters())
    trainer.train()
    evaluated = trainer.evaluate()
    trainer.save_model()
    return {
        "steps": [astuple(step) for step in steps(trainer)],
        "eval": (evaluated["eval_loss"], evaluated["eval_tokens"]),
        "partitioned": partitioned,
        "leaves": len(get_z3_leaf_modules(unwrapped(trainer))),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder with a checkpoint per family")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--steps", type=int, help="of every run; left out, by family and kind")
    parser.add_argument("modes", nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = given.out / f"rank{rank}-of-{world}"
    own.mkdir(parents=True, exist_ok=True)
    configs = deepspeed_configs(own)
    for mode in given.modes:
        way = mode.removesuffix(PACKED)
        zero = ("--deepspeed", configs[way]) if way in configs else ()
        packing = ("--packing", "batch") if mode.endswith(PACKED) else ()
        for family in given.families:
            # Adapters on experts for the mixture, on linear layers for the others.
            for kind in (kind for kind in given.kinds if (kind == "experts") <= (family == MIXTURE)):
                chosen = {**KINDS, **PAIRED, "experts": EXPERTS}[kind]
                name = f"{mode}-{family}-{kind}"
                batch = str(PER_RANK * 2 // world)
                length = str(given.steps or (BRIEF if family not in FAMILIES else STEPS if kind == "full" else SHORT))
                sizes = ("--per_device_train_batch_size", batch, "--per_device_eval_batch_size", batch)
                result = run(
                    given.checkpoints / family, given.data, given.out / name, *chosen, *zero, *sizes, *packing,
                    "--max_steps", length,
                )  # fmt: skip
                gc.collect()
                gc.freeze()  # what is left are modules; the next search need not go through them
                if rank == 0:
                    (given.out / f"results-{name}.json").write_text(json.dumps(result))
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    exit_after_handlers(0)
