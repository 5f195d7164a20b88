"""The tables of docs/scaling.md, measured and computed: ``python benchmarks/scaling_model.py``.

Writes them between their marks. What is measured is read from results.csv; steps on many GPUs are computed from the
sizes of MiniCPM-V 4.5 and the assumptions in ``Cluster`` and ``Sample`` below. ``--check`` writes nothing and ends with
1 if the tables there are others.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import results

from finetune.families import by_name
from finetune.planning.memory_estimate import GIB, MemoryEstimator
from finetune.planning.meta_model import quiet
from finetune.planning.training_setup import TrainingSetup
from finetune.training.flops import flops_of
from finetune.training.freezing import numel

PAGE = Path(__file__).resolve().parent.parent / "docs/scaling.md"
MODEL = "v4_5"
_GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Assumptions about machines of eight H100 or H200; rates in bytes per second.

    Attributes:
        peak: dense bf16 operations per second of a GPU.
        mfu: share of the peak that a GPU reaches while it computes and waits for nothing.
        inside: between the GPUs of a machine, per GPU and direction.
        between: of all links of a machine to the others, per direction.
        reached: share of these rates that collectives reach.
        hop: seconds from one GPU to the next in a ring.
        overlap: share of the shorter of computing and communicating that is hidden behind the longer.
        disk: of the shared file system, all machines together.
        writer: of one process.
        node: GPUs of a machine.
    """

    peak: float = 989e12
    mfu: float = 0.40
    inside: float = 450e9
    between: float = 8 * 400e9 / 8
    reached: float = 0.8
    hop: float = 5e-6
    overlap: float = 0.8
    disk: float = 10e9
    writer: float = 2e9
    node: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The mean sample of a mix of photos, documents, screenshots and pictures of phones.

    Attributes:
        tokens: of the LLM, those of images included.
        items: thumbnails and slices.
        patches: of an item.
        labelled: share of the tokens.
        stored: bytes of its images on disk.
    """

    tokens: int = 662
    items: float = 4.7
    patches: int = 1020
    labelled: float = 0.15
    stored: float = 0.6e6


FAST, SAMPLE = Cluster(), Sample()
SLOW = replace(FAST, between=100e9 / 8, hop=20e-6)
PACK = 4096
LORA = TrainingSetup(method="lora", stage=2, checkpointing=True)
FULL = TrainingSetup(method="full", stage=3, checkpointing=True)


@dataclass(frozen=True, slots=True)
class Size:
    """Numbers of a model as it is trained.

    Attributes:
        weights: parameters.
        trained: of them.
        layers: gathered one after another by ZeRO-3.
    """

    weights: int
    trained: int
    layers: int


@cache
def planner() -> MemoryEstimator:
    """Of the model."""
    with quiet():
        return MemoryEstimator(by_name(MODEL).published.config)


@cache
def size(method: str) -> Size:
    """Of a method."""
    with quiet():
        model = planner().model(TrainingSetup(method=method, stage=2))  # pyright: ignore[reportArgumentType]
    found = [(name, numel(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    layers = {match[0] for name, *_ in found if (match := re.match(r".*?layers\.\d+", name))}
    return Size(sum(n for _, n, _ in found), sum(n for _, n, trains in found if trains), len(layers))


@cache
def operations(method: str) -> float:
    """Of the training step of a mean sample."""
    with quiet():
        flops = flops_of(planner().model(TrainingSetup(method=method, stage=2)), by_name(MODEL))  # pyright: ignore[reportArgumentType]
    counts = {"tokens": SAMPLE.tokens, "pairs": SAMPLE.tokens**2, "labelled": SAMPLE.labelled * SAMPLE.tokens}
    counts |= {"patches": SAMPLE.items * SAMPLE.patches, "patch_pairs": SAMPLE.items * SAMPLE.patches**2}
    return flops.of(counts | {"groups": SAMPLE.items, "looks": 1})


@dataclass(frozen=True, slots=True)
class Step:
    """A step on many GPUs.

    Attributes:
        gpus: how many.
        samples: per GPU.
        compute: seconds of computing.
        talk: seconds of communication.
        seconds: of the step, with what is hidden behind each other.
        states: bytes of a GPU that are there all the time, and ZeRO's buffers, by the plan.
    """

    gpus: int
    samples: float
    compute: float
    talk: float
    seconds: float
    states: float

    @property
    def rate(self) -> float:
        """Samples per second on all GPUs."""
        return self.samples * self.gpus / self.seconds

    @property
    def efficiency(self) -> float:
        """Share of the step in which GPUs compute."""
        return self.compute / self.seconds


def step(recipe: TrainingSetup, gpus: int, tokens: int, cluster: Cluster, *, hpz: bool = False) -> Step:
    """A step of one micro-batch of so many tokens per GPU.

    ZeRO-3 gathers the weights in the forward and again in the backward pass and scatters the gradients; with hpZ the
    second gathering stays inside the machine, which keeps a copy. ZeRO-2 scatters the gradients and gathers what the
    optimizer changed.
    """
    sizes, samples = size(recipe.method), tokens / SAMPLE.tokens
    compute = samples * operations(recipe.method) / (cluster.peak * cluster.mfu)
    weights, trained = 2.0 * sizes.weights, 2.0 * sizes.trained
    if recipe.stage == 3:
        again = _collective(weights, min(gpus, cluster.node) if hpz else gpus, sizes.layers, cluster)
        talk = _collective(weights, gpus, sizes.layers, cluster) + again
        talk += _collective(trained, gpus, sizes.layers, cluster)
    else:
        talk = 2 * _collective(trained, gpus, max(1, round(trained / 4e8)), cluster)
    shared = cluster.overlap * min(compute, talk)
    with quiet():
        states = planner().resting(replace(recipe, gpus=gpus)).total + (weights / cluster.node if hpz else 0)
    return Step(gpus, samples, compute, talk, compute + talk - shared, states)


def _collective(size: float, gpus: int, pieces: int, cluster: Cluster) -> float:
    """Seconds to gather or scatter so many bytes, in rings of all GPUs, piece by piece."""
    rate = cluster.inside if gpus <= cluster.node else min(cluster.inside, cluster.between)
    return size * (gpus - 1) / gpus / (rate * cluster.reached) + pieces * (gpus - 1) * cluster.hop


def _row(name: str, made: Step) -> str:
    cells = [name, str(made.gpus), f"{made.samples:.1f}", f"{made.states / GIB:.0f}", f"{made.compute:.2f}"]
    cells += [f"{made.talk:.2f}", f"{made.seconds:.2f}", f"{100 * made.efficiency:.0f} %", f"{made.rate:,.0f}"]
    return f"| {' | '.join([*cells, f'{made.samples * made.gpus:,.0f}'])} |"


_COLUMNS = (
    "| | GPUs | samples per GPU | states, GB | computing, s | communication, s | step, s | efficiency | samples/s "
    "| samples in a step |"
)


def steps(cluster: Cluster, method: TrainingSetup, sizes: tuple[int, ...]) -> str:
    """The steps of a method on a cluster."""
    rows = [_COLUMNS, f"|{'---|' * 10}"]
    for tokens, name in ((SAMPLE.tokens, "one sample"), (PACK, f"pack of {PACK}")):
        for gpus in sizes:
            ways = [("ZeRO-2", 2, False), ("ZeRO-3", 3, False), *([("ZeRO-3, hpZ", 3, True)] if gpus > 8 else [])]
            for way, stage, hpz in ways:
                made = step(replace(method, stage=stage), gpus, tokens, cluster, hpz=hpz)
                rows.append(_row(f"{name}, {way}", made))
    return "\n".join(rows)


def feeding() -> str:
    """What the data side must bring on so many GPUs, and how long a checkpoint takes."""
    measured = [row for row in results.rows() if row["case"] == "sample preparation, mix, identical"]
    per_core = 1000 / float(measured[-1]["ours"]) if measured else None
    rows = ["| | GPUs | samples/s | cores per GPU | images, GB/s | checkpoint, GB | seconds |", f"|{'---|' * 7}"]
    for name, method in (("everything in full, ZeRO-3", FULL), ("LoRA, ZeRO-2", LORA)):
        for gpus in (8, 64, 512):
            made = step(method, gpus, PACK, FAST)
            cores = "not measured" if per_core is None else f"{made.rate / gpus / per_core:.1f}"
            stored, seconds = checkpoint(method)
            cells = [name, str(gpus), f"{made.rate:,.0f}", cores, f"{made.rate * SAMPLE.stored / _GIGA:.2f}"]
            rows.append(f"| {' | '.join([*cells, f'{stored / _GIGA:.1f}', f'{seconds:.0f}'])} |")
    return "\n".join(rows)


def checkpoint(recipe: TrainingSetup) -> tuple[float, float]:
    """Bytes of a checkpoint that can be resumed, and seconds: weights by rank 0, states by all, all read by rank 0."""
    sizes = size(recipe.method)
    weights = 2.0 * (sizes.weights if recipe.method == "full" else sizes.trained)
    states = 12.0 * sizes.trained
    if recipe.stage < 3:  # the weights once more, beside the states
        states += 2.0 * sizes.trained
    total = weights + states
    return total, weights / FAST.writer + states / FAST.disk + total / FAST.writer


def measured() -> str:
    """What results.csv has of one and two ranks on a CPU."""
    rows = ["| | samples/s on 2 ranks | on 1 rank | ratio |", "|---|---|---|---|"]
    newest = {row["case"]: row for row in results.rows() if row["benchmark"] == "scaling"}
    if not newest:
        return "Not measured yet."
    for case, row in newest.items():
        rows.append(f"| {case} | {row['ours']} | {row['theirs']} | {row['ratio']} |")
    *_, row = newest.values()
    return "\n".join(
        [*rows, "", f"Measured on {row['hardware']}; {row['versions'].replace(' ', ', ').replace('=', ' ')}."]
    )


def tables() -> Iterator[tuple[str, str]]:
    """Name and text of every table."""
    yield "measured", measured()
    yield "full", steps(FAST, FULL, (8, 64, 512))
    yield "lora", steps(FAST, LORA, (8, 64, 512))
    yield "slow", f"{steps(SLOW, FULL, (64,))}\n\nAnd LoRA:\n\n{steps(SLOW, LORA, (64,))}"
    yield "feeding", feeding()


def written(text: str) -> str:
    """The page with its tables.

    Raises:
        ValueError: the page lacks the marks of a table.
    """
    for name, body in tables():
        begin, end = f"<!-- {name}: written by benchmarks/scaling_model.py -->", f"<!-- {name}: end -->"
        before, first, rest = text.partition(begin)
        _, last, after = rest.partition(end)
        if not first or not last:
            raise ValueError(f"docs/scaling.md needs a line {begin!r} and below it {end!r}")
        text = f"{before}{begin}\n\n{body}\n\n{end}{after}"
    return text


def main() -> int:
    """Writes the tables; with --check 1 when they are others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    given = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = written(old)
    if given.check:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
