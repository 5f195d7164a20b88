"""Memory estimates as a text table."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.planning.memory_estimate import GIB, MemoryEstimate
from finetune.planning.training_setup import METHODS, TrainingSetup

COLUMNS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "context", "total", "host")

NOTE = """\
Estimated from sizes, nothing was run; GB is 2**30 bytes. The columns are the peak memory of a step on one GPU.
Activations assume SDPA or FlashAttention; context and allocator (1 GB and 3 %) are a rule of thumb; GPU peaks were not
measured. Leave a few percent free."""


def gigabytes(size: float) -> str:
    """Bytes as text."""
    return f"{size / GIB:.1f}"


def zero_name(setup: TrainingSetup) -> str:
    """ZeRO stage and offload as text."""
    return f"ZeRO-{setup.stage}{' offload' if setup.offload else ''}" if setup.stage else "none"


def table(rows: Sequence[tuple[TrainingSetup, MemoryEstimate]], limit: int) -> str:
    """One line per setup; a star if it fits."""
    head = f"  {'method':<9} {'DeepSpeed':<15} {'recompute':<10}" + "".join(f"{name:>12}" for name in COLUMNS)
    lines = [head]
    for setup, memory in rows:
        cells = "".join(f"{gigabytes(getattr(memory, name)):>12}" for name in COLUMNS)
        star = "*" if memory.total <= limit else " "
        recomputed = "+".join(setup.checkpoint_parts or ["yes"]) if setup.checkpointing else "no"
        lines.append(f"{star} {setup.method:<9} {zero_name(setup):<15} {recomputed:<10}{cells}")
    legend = "recompute: --gradient_checkpointing, of all parts or of one (--checkpoint_parts)"
    lines.append(f"* fits {gigabytes(limit)} GB; {legend}; host: CPU memory per GPU")
    return "\n".join(lines)


def advice(setup: TrainingSetup, memory: MemoryEstimate, other_flags: Sequence[str]) -> str:
    """A setup that fits, as a command to paste."""
    host = f" and {gigabytes(memory.host)} GB of CPU memory for each" if memory.host else ""
    gpus = f"{setup.gpus} GPU{'s' if setup.gpus > 1 else ''}"
    return (
        f"{setup.method} ({METHODS[setup.method]}): {gigabytes(memory.total)} GB on {gpus}{host}\n"
        f"  torchrun --nproc_per_node {setup.gpus} finetune.py {' '.join([*other_flags, *setup.flags()])}"
    )
