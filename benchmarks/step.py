"""Time of a training step, with packing and fused lm_head loss, against the published scripts.

    python benchmarks/step.py [--dry]

Three samples of 310, 640 and 1150 tokens, a quarter of them labelled, one thread, float32. The network is the same
MiniCPMV on both sides. Theirs is a plain re-creation of what the published scripts do: rows padded to the longest,
logits of every position in float32, cross entropy with the labels that the data set has moved by one. Ours is one
packed row and the network's own loss. Both sides take turns, the median of the processor time counts, and losses and
gradients must agree. Memory is the highest point of all allocations of torch in one forward and backward pass,
gradients included, a fresh process per side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from results import Row, append
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from finetune.families import by_name
from finetune.models import MiniCPMV, MiniCPMVConfig

LENGTHS = (310, 640, 1150)
LABELLED = (77, 160, 320)
SMALL_HEAD = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "vocab_size": 4008}
LARGE_HEAD = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "vocab_size": 128256}
ROUNDS = 5
Step = Callable[[MiniCPMV], torch.Tensor]


def network(sizes: dict[str, int]) -> MiniCPMV:
    """MiniCPM-Llama3-V 2.5 in small, heads of 64 and a tiny vision part (a batch of text passes a dummy through it)."""
    heads = sizes["hidden_size"] // 64
    published = by_name("llama3_v2_5").published.config
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    config: dict[str, Any] = {**published, **sizes, "vision_config": {**published["vision_config"], **vision}}
    config |= {"num_attention_heads": heads, "num_key_value_heads": max(heads // 4, 1)}
    torch.manual_seed(0)
    return MiniCPMV(MiniCPMVConfig(**config)).train()


def samples(vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels (T,) of every sample, the answer at its end."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, labelled in zip(LENGTHS, LABELLED, strict=True):
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[-labelled:] = ids[-labelled:]
        made.append((ids, labels))
    return made


def theirs(vocabulary: int) -> Step:
    """Padded rows, float32 logits of all positions."""
    rows = samples(vocabulary)
    longest = max(LENGTHS)
    ids, moved, mask = torch.zeros(3, len(rows), longest, dtype=torch.int64)
    moved -= 100
    for row, (tokens, labels) in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        moved[row, : len(tokens) - 1] = labels[1:]
    positions = torch.arange(longest).repeat(len(rows), 1)

    def step(model: MiniCPMV) -> torch.Tensor:
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        assert out.logits is not None
        return F.cross_entropy(out.logits.float().flatten(0, 1), moved.flatten())

    return step


def ours(vocabulary: int) -> Step:
    """One packed row, the network's own loss."""
    rows = samples(vocabulary)
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    batch: dict[str, Any] = {
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "labels": torch.cat([labels for _, labels in rows])[None],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }
    return lambda model: model(**batch).loss


SIDES = {"ours": ours, "theirs": theirs}
SIZES = {"small": SMALL_HEAD, "large": LARGE_HEAD}


def compared(size: str) -> dict[str, float]:
    """Median processor seconds of a step of each side, which take turns.

    Raises:
        AssertionError: their losses or gradients differ.
    """
    model = network(SIZES[size])
    steps = {side: make(SIZES[size]["vocab_size"]) for side, make in SIDES.items()}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(ROUNDS + 1):
        found = {}
        for side, step in steps.items():
            start = time.process_time()
            loss = step(model)
            loss.backward()
            if turn:  # the first is for warming up and for the comparison
                times[side].append(time.process_time() - start)
            else:
                found[side] = loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
        if not turn:
            agree(*found.values())
    return {side: statistics.median(seconds) for side, seconds in times.items()}


def agree(a: tuple[float, list[torch.Tensor]], b: tuple[float, list[torch.Tensor]]) -> None:
    """Holds two losses and their gradients against each other, to the rounding of float32."""
    assert abs(a[0] - b[0]) < 1e-5 * abs(b[0]), f"losses {a[0]} and {b[0]}"
    assert len(a[1]) == len(b[1])
    for one, other in zip(a[1], b[1], strict=True):
        difference, size = (one - other).norm(), other.norm()
        assert difference < 1e-4 * max(size, 1e-6), f"gradients of norm {size} differ by {difference}"


def peak(size: str, side: str) -> int:
    """Bytes at the highest point of a forward and backward pass, beyond the weights."""
    model, step = network(SIZES[size]), SIDES[side](SIZES[size]["vocab_size"])
    step(model).backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model).backward()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    totals = [event["args"] for event in events if event["name"] == "[memory]"]
    before = totals[0]["Total Allocated"] - totals[0]["Bytes"]
    return max(total["Total Allocated"] for total in totals) - before


def peak_in_its_own_process(size: str, side: str) -> float:
    """As ``peak``, in MB."""
    command = [sys.executable, __file__, "--peak", size, side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) / 1e6


def main(*, dry: bool) -> None:
    """Runs the three cases, prints them and adds them to results.csv."""
    rows: list[Row] = []
    for case, size in (
        ("training step, 8 layers, vocabulary 4008", "small"),
        ("training step, vocabulary 128256", "large"),
    ):
        times = compared(size)
        rows.append((case, times["ours"], times["theirs"], times["theirs"] / times["ours"], "CPU s, theirs / ours"))
    a, b = (peak_in_its_own_process("large", side) for side in SIDES)
    rows.append(("peak memory of the step, vocabulary 128256", a, b, b / a, "MB, theirs / ours"))
    for case, mine, other, ratio, unit in rows:
        print(f"{case:<44} {mine:9.4g} {other:9.4g} {ratio:6.2f}  {unit}")
    if not dry:
        append("step", rows, ("torch", "transformers"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print(peak(*given.peak))
    else:
        main(dry=given.dry)
