"""Checkpoint folders that no run has written, with all that one needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune.arguments.training import TrainingArguments
from finetune.checkpoints.manifest import describe, write


def training(output: Path, resume: str = "auto", **flags) -> TrainingArguments:
    """Flags of a LoRA run on the CPU."""
    options = {"use_cpu": True, "use_lora": True, "report_to": "none", "resume_from_checkpoint": resume, **flags}
    return TrainingArguments(output_dir=str(output), **options)


def fill(folder: Path, step: int, *, zero: int = 0, world: int = 1, method: str = "lora") -> None:
    """The files of a checkpoint but its manifest."""
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    save_file({"a": torch.full((8,), float(step)), "b": torch.zeros(2, dtype=torch.bfloat16)}, folder / name)
    (folder / "adapter_config.json").write_text("{}")
    state = {"global_step": step, "log_history": [], "stateful_callbacks": {}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    plain = {"state": torch.zeros(4)}
    ranks = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    for file in ["scheduler.pt", *ranks] if zero else ["scheduler.pt", "optimizer.pt", *ranks]:
        torch.save(plain, folder / file)
    if zero:
        (folder / "latest").write_text("global_step")
        (folder / "global_step").mkdir()
        torch.save(plain, folder / "global_step" / "mp_rank_00_model_states.pt")
        for rank in range(world):
            torch.save(plain, folder / "global_step" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def checkpoint(output: Path, step: int, **layout) -> Path:
    """A made-up checkpoint folder, complete; ``layout`` are fields of its manifest."""
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    chosen = {"zero": layout.get("zero_stage", 0), "world": layout.get("world_size", 1)}
    fill(folder, step, **chosen, method=layout.get("method", "lora"))
    sign(folder, step, output, **layout)
    return folder


def sign(folder: Path, step: int, output: Path, **layout) -> None:
    """Writes the manifest of what a folder holds now."""
    write(folder, step, {**describe(training(output)), "run": "r", "attempt": 1, **layout})
