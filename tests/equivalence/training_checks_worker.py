"""Worker of test_training_checks_modes.py: trains as one of two ranks with faults; writes how each run ended."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from stack import build, flags, steps, unwrapped  # noqa: E402
from torch import nn  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from worker import deepspeed_configs  # noqa: E402

from finetune.checkpoints.manifest import checkpoints, read  # noqa: E402
from finetune.runtime.outcome import exit_after_handlers  # noqa: E402
from finetune.utils.errors import UserError  # noqa: E402
from trainer import CPMTrainer  # noqa: E402

FAMILY = "llama3_v2_5"
# DDP cannot detach: its reducer complains itself about what never gets a gradient.
FAULTS_BY_MODE = {
    "ddp": ("nan_for_good", "nan_now_and_then", "frozen", "full_disk"),
    "zero2": ("nan_for_good", "nan_now_and_then", "detached", "full_disk"),
    "zero3": ("nan_for_good", "nan_now_and_then", "detached", "full_disk", "spoilt_part"),
    "zero2-bf16": ("nan_for_good",),
}
# Those whose runs save their checkpoints.
SAVING = ("full_disk", "spoilt_part")
RANK = int(os.environ.get("RANK", "0"))


def poison(trainer: CPMTrainer, when: Callable[[int], bool]) -> None:
    """On rank 1 the resampler's result is NaN in some steps, counted from 1."""

    def spoil(_: nn.Module, __: object, result: torch.Tensor) -> torch.Tensor:
        return result * torch.nan if RANK == 1 and when(trainer.state.global_step + 1) else result

    unwrapped(trainer).get_submodule("resampler").register_forward_hook(spoil)


def nan_for_good(trainer: CPMTrainer) -> None:
    poison(trainer, lambda step: step >= 2)


def nan_now_and_then(trainer: CPMTrainer) -> None:
    poison(trainer, lambda step: step in (2, 3, 5))


def frozen(trainer: CPMTrainer) -> None:
    unwrapped(trainer).get_submodule("vpm").requires_grad_(False)


def detached(trainer: CPMTrainer) -> None:
    unwrapped(trainer).get_submodule("vpm").register_forward_hook(lambda _, __, result: result.detach())


def full_disk(trainer: CPMTrainer) -> None:
    """The second rank cannot write its part of the second checkpoint."""

    def save(value: Any, path: Any, **options: Any) -> None:
        name = Path(path).name
        own = "rank_1_" in name if trainer.args.deepspeed else name == "rng_state_1.pth"
        if RANK == 1 and trainer.state.global_step == 2 and own:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 210496 vs 210388")
        WRITE(value, path, **options)

    torch.save = save


def spoilt_part(trainer: CPMTrainer) -> None:
    """Once two steps are made the second rank's part of a weight is not finite."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if RANK == 1 and state.global_step == 2:
                weight: Any = unwrapped(trainer).get_parameter("resampler.kv_proj.weight")
                weight.ds_tensor[0] = torch.inf

    trainer.add_callback(Spoil())


FAULTS = {f.__name__: f for f in (nan_for_good, nan_now_and_then, frozen, detached, full_disk, spoilt_part)}
WRITE = torch.save


def outcome(trainer: CPMTrainer) -> dict:
    """How a run ends: message, whether all weights are finite, what was logged."""
    error = None
    try:
        trainer.train()
    except UserError as raised:
        error = f"{type(raised).__name__}: {raised}"
    torch.save = WRITE
    finite = all(bool(torch.isfinite(p.detach()).all()) for p in unwrapped(trainer).parameters())
    saved = [step for step, folder in checkpoints(Path(trainer.args.output_dir or "")) if read(folder) is not None]
    losses = [step.loss for step in steps(trainer)]
    return {
        "error": error,
        "finite": finite,
        "losses": losses,
        "saved": saved,
        "unsaved": trainer.checkpoint_manager.unsaved,
    }


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
            if name in SAVING:
                sizes = (*sizes[:2], "--max_steps", "3" if name == "full_disk" else "6")
                sizes += ("--save_strategy", "steps", "--save_steps", "1")
            output = given.out / f"{mode}-{name}"
            argv = flags(given.checkpoints / FAMILY, given.data, output, *zero, *precision, *sizes)
            trainer = build(argv)
            FAULTS[name](trainer)
            results[f"{mode}-{name}"] = outcome(trainer)
            del trainer
            gc.collect()
            gc.freeze()  # what is left are modules; the next search need not go through them
    (given.out / f"checks-{RANK}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    exit_after_handlers(0)
