"""The performance table of docs/performance.md, from the newest rows of results.csv: ``python benchmarks/table.py``.

Writes it between its two marks. ``--check`` writes nothing and ends with 1 if the table there is another one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import results
from results import FILE, OFFICIAL

PAGE = FILE.parent.parent / "docs/performance.md"
BEGIN, END = "<!-- performance: written by benchmarks/table.py -->", "<!-- performance: end -->"
_HEAD = ("what", "against", "goal", "ratio", "ours", "theirs", "unit", "commit")


@dataclass(frozen=True, slots=True)
class Goal:
    """A line of the table.

    Attributes:
        benchmark: the script of this folder that measures it, without ".py".
        case: the case in results.csv, or how it begins: sizes may follow behind a comma.
        what: the same in words.
        against: what it is measured against in the same run.
        goal: of the ratio, or what is named.
    """

    benchmark: str
    case: str
    what: str
    against: str
    goal: str


_VENDOR, _CODE = "the published scripts", "their own dataset.py"
_LF = "LLaMA-Factory's data path"
_HEADERS = "reading JSON and image headers"
_OLD = "commit 1cc6bf4"
_STEPS = "samples per second, 2 ranks, ZeRO-2"
GOALS = (
    Goal("samples", "sample preparation, mix, identical", "preparing a sample, same bytes", _VENDOR, "4.5"),
    Goal("samples", "sample preparation, mix, --image_backend fast", "`--image_backend fast`", _VENDOR, "4.5"),
    Goal("samples", "text side, mix", "of it ids, labels and placeholders", _VENDOR, "25"),
    Goal("samples", f"sample preparation, mix, identical, {OFFICIAL}", "preparing a sample, same bytes", _CODE, "5"),
    Goal("samples", f"sample preparation, mix, --image_backend fast, {OFFICIAL}", "`--image_backend fast`", _CODE, "7"),
    Goal("samples", f"text side, mix, {OFFICIAL}", "of it ids, labels and placeholders", _CODE, "25"),
    Goal(
        "llamafactory_samples", "sample preparation, mix, identical", "preparing a sample, same bytes", _LF, "above 1"
    ),
    Goal("llamafactory_samples", "sample preparation, mix, --image_backend fast", "`--image_backend fast`", _LF, "6"),
    Goal("log_mel", "log-mel features of 1 s", "features of a sound of 1 s, same bits", "padded to 30 s", "10"),
    *(
        Goal("video", f"{what}, v2_6, against {way}", name, whom, "3")
        for way, whom in (("sequential", "LLaMA-Factory's way"), ("decord", "the model card's way"))
        for what, name in (("CPU time", "64 frames of 60 s in 1080p to patches"), ("wall time", "the same, wall time"))
    ),
    Goal("transport", "transport of a 10-slice sample", "worker to training process, 10 slices", "fp32 patches", "6"),
    Goal("step", "training step, 8 layers, vocabulary 4008", "training step, small vocabulary", _VENDOR, "1.9"),
    Goal("step", "training step, vocabulary 128256", "training step, large vocabulary", _VENDOR, "6"),
    Goal("step", "peak memory of the step, vocabulary 128256", "its peak memory", _VENDOR, "8"),
    Goal("packing", "pack fill at 4096 tokens", "tokens in packs of 4096", "padded batches", "99 % full"),
    Goal("packing", "rank imbalance, 8 ranks", "slowest of 8 ranks by their mean", "random batches", "ours 1.02"),
    Goal("packing", "rank imbalance, 8 ranks, batch_rebalance", "the same", "transformers' batch_rebalance", "above 1"),
    *(
        Goal("end_to_end", f"{_STEPS}{option}{again}{side}", what, whom, "above 1" if again else goal)
        for side, whom, goals in (("", _VENDOR, ("2.5", "2.5")), (f", {OFFICIAL}", _CODE, ("3.5", "4")))
        for again in ("", ", no layer run again on either side")
        for option, what, goal in (
            ("", "theirs without gradient checkpointing" if again else "training, 2 ranks, ZeRO-2", goals[0]),
            (", --image_backend fast", "`--image_backend fast`", goals[1]),
        )
    ),
    Goal("gpu", "training, lora, all layers", "LoRA of an 8B model on a GPU", _VENDOR, "2"),
    Goal(
        "gpu", "model FLOP utilisation, lora, all layers", "its model FLOP utilisation", "the GPU's peak", "ours 35 %"
    ),
    Goal("gpu", "peak memory, lora, all layers, 2048 tokens", "its memory, 2048 tokens", _VENDOR, "ours below 20"),
    Goal("gpu", "training, full, 12 layers", "the same model with 12 layers in full", _VENDOR, "2"),
    Goal("gpu", "model FLOP utilisation, full, 12 layers", "its model FLOP utilisation", "the GPU's peak", "ours 40 %"),
    *(
        Goal("step_memory", f"above the weights, LoRA, {how}, planned for v4_5", what, _OLD, "1.25")
        for how, what in (
            ("not recomputed", "a LoRA step of an 8B model, above its weights"),
            ("recomputed", "the same, layers recomputed"),
        )
    ),
    Goal("adapter_bytes", "LoRA checkpoint, same LLM targets", "bytes of a LoRA checkpoint", _VENDOR, "7"),
    Goal(
        "adapter_bytes",
        "LoRA checkpoint, adapters alone (tune_resampler false)",
        "`--tune_resampler false`",
        _VENDOR,
        "15",
    ),
    Goal("records", "reopening", "opening a million records again", "`json.load`", "100"),
    Goal("records", "private memory", "their private memory", "`json.load`", "ours below 50"),
    Goal("checking", "CPU time, check of 100000 records", "checking a record with an image", _HEADERS, "ours 1.2"),
    Goal("checking", "memory, check of 100000 records", "memory for 100,000 of them", "100 records", "ours below 300"),
    Goal("manifest", "waiting for the manifest", "waiting for a checkpoint's manifest", _OLD, "10"),
    Goal("manifest", "manifest and writing", "making the manifest", "writing the bytes", "20"),
    Goal(
        "manifest", "manifest beside two busy ranks and writing", "the same, two busy ranks", "writing the bytes", "20"
    ),
    Goal("startup", "CPU time, finetune.py --help", "`finetune.py --help`", _OLD, "6.5"),
    Goal("startup", "CPU time, check of 128 small records", "`check` of 128 small records", _OLD, "2.7"),
    Goal("startup", "CPU time, one LoRA step, not verified", "one LoRA step of a tiny model", _OLD, "1.6"),
    Goal("startup", "CPU time, one LoRA step, verified", "the same, verified", _OLD, "1.8"),
    Goal("startup", "CPU time, finetune_lora.sh", "`finetune_lora.sh`, 2 ranks, one step, verified", _OLD, "1.8"),
    *(
        Goal("evaluation", f"evaluate, 256 questions, {whom} one by one", "256 questions, batches of 8", name, "4")
        for whom, name in (
            ("the vendor's model.chat", "their own `model.chat`"),
            ("our model.chat", "our `model.chat`"),
        )
    ),
    *(
        Goal("preference", f"step of preference training, {name}, v4_6 of 248320 tokens", what, "TRL's way", "1.6")
        for name, what in (("cached", "a step of DPO, reference cached"), ("adapter_off", "the same, adapter off"))
    ),
    Goal("merge_memory", "peak memory", "peak memory of a merge", "`merge_and_unload`", "above 1"),
)


def newest(goal: Goal, rows: Sequence[dict[str, str]]) -> dict[str, str] | None:
    """The last row of a goal: of its very case if there is one, else of a case that goes on behind a comma."""
    own = [row for row in rows if row["benchmark"] == goal.benchmark]
    for fits in (
        [row for row in own if row["case"] == goal.case],
        [row for row in own if row["case"].startswith(f"{goal.case}, ") and not _named(row["case"], goal)],
    ):
        if fits:
            return fits[-1]
    return None


def _named(case: str, goal: Goal) -> bool:
    """Whether a case is that of a longer goal."""
    longer = (other.case for other in GOALS if len(other.case) > len(goal.case) and other.benchmark == goal.benchmark)
    return any(case == other or case.startswith(f"{other}, ") for other in longer)


def section(rows: Sequence[dict[str, str]]) -> str:
    """The table in Markdown, and a line on what it was measured with."""
    lines = [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
    shown = []
    for goal in GOALS:
        cells = [goal.what, goal.against, goal.goal]
        if (row := newest(goal, rows)) is None:
            cells += ["not measured", "", "", "", ""]
        else:
            shown.append(row)
            figures = [_short(float(row[name])) for name in ("ratio", "ours", "theirs")]
            cells += [f"**{figures[0]}**", *figures[1:], row["unit"], row["commit"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _measured_with(shown)])


def _measured_with(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return "Nothing is measured yet."
    hardware = _joined(row["hardware"] for row in rows)
    versions: dict[str, list[str]] = {}
    for word in (word for row in rows for word in row["versions"].split()):
        name, _, number = word.partition("=")
        versions.setdefault(name, []).append(number)
    packages = ", ".join(f"{name} {_joined(numbers, '/')}" for name, numbers in sorted(versions.items()))
    return f"Measured on {hardware}; {packages}."


def _joined(words: Iterable[str], between: str = "; ") -> str:
    return between.join(dict.fromkeys(words))


def _short(number: float) -> str:
    """Four digits or so, without powers of ten."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.4g}" if abs(number) >= 0.001 else f"{number:.5f}"


def written(text: str, rows: Sequence[dict[str, str]]) -> str:
    """The page with the table of these rows.

    Raises:
        ValueError: the page does not have the two marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/performance.md needs a line {BEGIN!r} and below it {END!r}")
    return f"{before}{BEGIN}\n\n{section(rows)}\n\n{END}{after}"


def main() -> int:
    """Writes the table; with --check 1 when it is another one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    given = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = written(old, results.rows())
    if given.check:
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
