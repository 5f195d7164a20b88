"""Memory of a LoRA step above the weights, now and before: ``python benchmarks/step_memory.py``.

The plan of the published 8B networks of MiniCPM-V 4.5 and Llama3-V 2.5: a sample of 2048 tokens with ten slices, bf16,
on a GPU, its layers recomputed in the backward pass and not recomputed, and everything but the weights and the CUDA
context counted. Then a small network of 4.5 in float32 on the CPU, measured. Every figure is of a process of its own.
Theirs has the norms and MLPs of transformers and a resampler that is not recomputed, as at commit 1cc6bf4, whose plan
has the same figures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plan_memory
from results import Row, append
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.families import by_name
from finetune.models import minicpmv
from finetune.planning import activation_trace, meta_step
from finetune.planning.memory_estimate import MemoryEstimator
from finetune.planning.training_setup import SampleShape, TrainingSetup

GOAL = 1 / 0.8
FAMILIES = ("v4_5", "llama3_v2_5")
_SHAPE = SampleShape(tokens=2048, items=10)
_CASES = {"recomputed": "LoRA, images, layers run again", "not recomputed": "LoRA, images"}


def planned(family: str, *, recomputed: bool) -> float:
    """Bytes above the weights, as planned."""
    setup = TrainingSetup(method="lora", checkpointing=recomputed)
    memory = MemoryEstimator(by_name(family).published.config).memory(setup, _SHAPE)
    return memory.total - memory.weights - memory.context


def measured(how: str) -> float:
    """Bytes that come and go with a step of the small network."""
    from tools.measured_peak import measured

    case = _CASES[how]
    return measured(plan_memory.config_of(case), *plan_memory.CASES[case])[1]


@contextmanager
def as_before() -> Iterator[None]:
    """Within, models have transformers' own norms and MLPs, and a resampler that is not recomputed."""
    with ExitStack() as stack:
        for module, name, value in (
            (minicpmv, "put_lean_layers", lambda llm: None),
            (minicpmv, "recomputed_in_chunks", lambda resampler, x: resampler(x.patches, x.sizes, x.times, x.groups)),
            (activation_trace, "RECOMPUTED", (GradientCheckpointingLayer,)),
            (meta_step, "RECOMPUTED", (GradientCheckpointingLayer,)),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield


def of(side: str, what: str, how: str) -> float:
    """A figure of a side, from a process of its own.

    Args:
        side: "ours" or "theirs".
        what: a family, or "measured".
        how: a key of ``_CASES``.
    """
    command = [sys.executable, __file__, "--one", side, what, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def one(side: str, what: str, how: str) -> float:
    """As ``of``, in this process."""
    with as_before() if side == "theirs" else nullcontext():
        return measured(how) if what == "measured" else planned(what, recomputed=how == "recomputed")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.one:
        print(one(*given.one))
        return 0
    rows: list[Row] = []
    for what in (*FAMILIES, "measured"):
        for how in _CASES:
            ours, theirs = (of(side, what, how) / 1e6 for side in ("ours", "theirs"))
            title = "measured on a small network" if what == "measured" else f"planned for {what}"
            rows.append((f"above the weights, LoRA, {how}, {title}", ours, theirs, theirs / ours, "MB"))
            print(f"{rows[-1][0]:<70} {ours:>9.1f} {theirs:>9.1f} {rows[-1][3]:>6.3f}  MB", flush=True)
    if not given.dry:
        append("step_memory", rows, ["torch", "transformers", "peft"])
    return 0 if min(row[3] for row in rows if "planned" in row[0]) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
