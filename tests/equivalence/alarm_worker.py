"""Trains as one of two ranks with faults put in, mode by mode; every rank writes how each run ended."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from stack import build, flags, network, steps  # noqa: E402
from torch import nn  # noqa: E402
from worker import deepspeed_configs  # noqa: E402

from finetune.errors import UserError  # noqa: E402
from finetune.outcome import leave  # noqa: E402
from trainer import CPMTrainer  # noqa: E402

FAMILY = "llama3_v2_5"
# DDP cannot detach: its reducer complains itself about what never gets a gradient.
FAULTS_BY_MODE = {
    "ddp": ("nan_for_good", "nan_now_and_then", "frozen"),
    "zero2": ("nan_for_good", "nan_now_and_then", "detached"),
    "zero3": ("nan_for_good", "nan_now_and_then", "detached"),
    "zero2-bf16": ("nan_for_good",),
}
RANK = int(os.environ.get("RANK", "0"))


def poison(trainer: CPMTrainer, when: Callable[[int], bool]) -> None:
    """On rank 1 the resampler's result is NaN in some steps, counted from 1."""

    def spoil(_: nn.Module, __: object, result: torch.Tensor) -> torch.Tensor:
        return result * torch.nan if RANK == 1 and when(trainer.state.global_step + 1) else result

    network(trainer).get_submodule("resampler").register_forward_hook(spoil)


def nan_for_good(trainer: CPMTrainer) -> None:
    poison(trainer, lambda step: step >= 2)


def nan_now_and_then(trainer: CPMTrainer) -> None:
    poison(trainer, lambda step: step in (2, 3, 5))


def frozen(trainer: CPMTrainer) -> None:
    network(trainer).get_submodule("vpm").requires_grad_(False)


def detached(trainer: CPMTrainer) -> None:
    network(trainer).get_submodule("vpm").register_forward_hook(lambda _, __, result: result.detach())


FAULTS = {fault.__name__: fault for fault in (nan_for_good, nan_now_and_then, frozen, detached)}


def outcome(trainer: CPMTrainer) -> dict:
    """How a run ends: message, whether all weights are finite, what was logged."""
    error = None
    try:
        trainer.train()
    except UserError as raised:
        error = f"{type(raised).__name__}: {raised}"
    finite = all(bool(torch.isfinite(p.detach()).all()) for p in network(trainer).parameters())
    return {"error": error, "finite": finite, "losses": [step.loss for step in steps(trainer)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--checkpoints", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    own = given.out / f"rank{RANK}"
    own.mkdir(parents=True)
    configs = deepspeed_configs(own)
    results = {}
    for mode, names in FAULTS_BY_MODE.items():
        zero = ("--deepspeed", configs[mode.partition("-")[0]]) if mode.startswith("zero") else ()
        precision = ("--bf16", "true") if mode.endswith("bf16") else ()
        for name in names:
            sizes = ("--per_device_train_batch_size", "2", "--max_steps", "6")
            argv = flags(given.checkpoints / FAMILY, given.data, given.out / "run", *zero, *precision, *sizes)
            trainer = build(argv)
            FAULTS[name](trainer)
            results[f"{mode}-{name}"] = outcome(trainer)
            del trainer
            gc.collect()
            gc.freeze()  # what is left are modules; the next search need not go through them
    (given.out / f"alarms-{RANK}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
