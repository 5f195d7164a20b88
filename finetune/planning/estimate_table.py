"""Plans as text."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.planning.memory_estimate import GIB, MemoryEstimate
from finetune.planning.training_setup import METHODS, TrainingSetup

COLUMNS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "context", "total", "host")

NOTE = """\
Estimated from sizes, nothing was run; GB is 2**30 bytes. The columns are what lies on one GPU at the highest point of
a step. Activations assume SDPA or FlashAttention; context and allocator (1 GB and 3 %) are a rule of thumb; GPU peaks
were not measured. Leave a few percent free."""


def gigabytes(size: float) -> str:
    """Bytes as text."""
    return f"{size / GIB:.1f}"


def zero_name(recipe: TrainingSetup) -> str:
    """How the states are shared, in words."""
    return f"ZeRO-{recipe.stage}{' offload' if recipe.offload else ''}" if recipe.stage else "none"


def table(rows: Sequence[tuple[TrainingSetup, MemoryEstimate]], limit: int) -> str:
    """One line per setting; a star where it fits."""
    head = f"  {'method':<9} {'DeepSpeed':<15} {'again':<7}" + "".join(f"{name:>12}" for name in COLUMNS)
    lines = [head]
    for recipe, memory in rows:
        cells = "".join(f"{gigabytes(getattr(memory, name)):>12}" for name in COLUMNS)
        star = "*" if memory.total <= limit else " "
        again = "+".join(recipe.checkpoint_parts or ["yes"]) if recipe.checkpointing else "no"
        lines.append(f"{star} {recipe.method:<9} {zero_name(recipe):<15} {again:<7}{cells}")
    again = "again: --gradient_checkpointing, of all parts or of one (--checkpoint_parts)"
    lines.append(f"* fits {gigabytes(limit)} GB; {again}; host: memory of the machine per GPU")
    return "\n".join(lines)


def advice(recipe: TrainingSetup, memory: MemoryEstimate, more: Sequence[str]) -> str:
    """A setting that fits as flags to paste."""
    host = f" and {gigabytes(memory.host)} GB of the machine's memory for each" if memory.host else ""
    gpus = f"{recipe.gpus} GPU{'s' if recipe.gpus > 1 else ''}"
    return (
        f"{recipe.method} ({METHODS[recipe.method]}): {gigabytes(memory.total)} GB on {gpus}{host}\n"
        f"  torchrun --nproc_per_node {recipe.gpus} finetune.py {' '.join([*more, *recipe.flags()])}"
    )
