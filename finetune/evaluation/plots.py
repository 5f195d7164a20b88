"""Training curves as PNG (loss.png) with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.pages.charts import smoothed, wants_log
from finetune.pages.html_page import count
from finetune.utils.quoting import plain, truncate_middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that are distinguishable for colour-blind readers and in greyscale.
_TRAIN, _EVAL, _RATE, _NORM = "#4477aa", "#cc3311", "#228833", "#aa7744"
# Curves with at most this many points get markers, so that a run of one step is visible.
_FEW = 30
# A logarithmic axis whose range is below this ratio gets ticks between powers of ten.
_FEW_POWERS = 500.0
# Maximum characters of a folder name in a title.
_NAME = 32


# Keys that an evaluation logs besides its loss and the metric of --eval_generate.
_COUNTS = ("eval_loss", "eval_tokens", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
_COUNTS += ("eval_model_preparation_time",)


_SHARES = {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"}
PREFERENCE_PREFIXES = ("rewards/", "length/", "eval_rewards/", "eval_length/")
"""How the figures of preference training begin."""


def metric_names(entry: Mapping[str, Any]) -> list[str]:
    """The keys of a log entry that come from --eval_generate."""
    return [
        key
        for key in entry
        if key.startswith("eval_") and not key.startswith(PREFERENCE_PREFIXES) and key not in _COUNTS
    ]


def points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Step and value of every entry of a log that has a finite value."""
    return [(entry["step"], entry[key]) for entry in history if key in entry and math.isfinite(entry[key])]


def plotted(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """All points of the plot of a log, by their key."""
    keys = dict.fromkeys(name for entry in history for name in (*metric_names(entry), *_SHARES) if name in entry)
    return {key: points(history, key) for key in ("loss", "eval_loss", "learning_rate", "grad_norm", *keys)}


def plot_training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses above, learning rate and gradient norm below, over optimizer steps; a PNG that is readable when small.

    Between them, if logged, the share of right pairs of preference training, or the first two metrics of
    --eval_generate. Curves of many points are smoothed and drawn over
    the raw values in a pale colour; axes with a large range are logarithmic.

    Args:
        history: ``trainer.state.log_history``.
        path: the PNG to write, replaced atomically; nothing is written when no loss was logged.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    if not points(history, "loss") and not points(history, "eval_loss"):
        return
    found = [name for entry in history for name in (*(key for key in _SHARES if key in entry), *metric_names(entry))]
    generated = list(dict.fromkeys(found))[:2]
    heights = (3, 2, 2) if generated else (3, 2)
    figure = Figure(figsize=(7, 2.7 + 2.05 * len(heights)))
    # Fixed margins that fit the longest tick labels: a layout that measures them draws everything twice.
    figure.subplots_adjust(left=0.16, right=0.85, top=1 - 0.85 / figure.get_figheight(), hspace=0.12)
    figure.subplots_adjust(bottom=0.75 / figure.get_figheight())
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle(_title(history, path), fontsize=14, x=0.02, ha="left", parse_math=False)
    _losses(panels[0], history)
    if generated:
        for name, color in zip(generated, (_EVAL, _NORM), strict=False):
            _curve(panels[1], history, name, _SHARES.get(name, name.removeprefix("eval_")), color)
        panels[1].set_ylabel("right pairs" if generated[0] in _SHARES else "answers", fontsize=15)
        panels[1].legend(fontsize=14)
    norms = _rates(panels[-1], history)
    for axes in (*panels, norms):
        axes.tick_params(labelsize=13)
    for axes in panels:
        axes.grid(alpha=0.3)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=110, format="png")
    unfinished.replace(path)


def _title(history: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Run name and latest losses."""
    steps = max(entry["step"] for entry in history if "step" in entry)
    known = (("loss", "training"), ("eval_loss", "evaluation"))
    last = [f"{word} {found[-1][1]:.4g}" for key, word in known if (found := points(history, key))]
    name = path.absolute().parent.name
    return f"{truncate_middle(plain(name), _NAME)}\n{count(steps, 'step')}, loss: {', '.join(last)}"


def _losses(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    _curve(axes, history, "loss", "training", _TRAIN)
    _curve(axes, history, "eval_loss", "evaluation", _EVAL)
    _scale(axes, [value for key in ("loss", "eval_loss") for _, value in points(history, key)])
    axes.set_ylabel("loss", fontsize=15)
    axes.legend(fontsize=14)


def _rates(axes: Axes, history: Sequence[Mapping[str, Any]]) -> Axes:
    """Learning rate on the left axis, gradient norm on the right one, which is returned."""
    from matplotlib.ticker import MaxNLocator

    _curve(axes, history, "learning_rate", "learning rate", _RATE, smooth=False)
    axes.set_ylabel("learning rate", fontsize=15, color=_RATE)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.yaxis.get_offset_text().set_fontsize(13)
    norms = axes.twinx()
    _curve(norms, history, "grad_norm", "gradient norm", _NORM)
    _scale(norms, [value for _, value in points(history, "grad_norm")])
    norms.set_ylabel("gradient norm", fontsize=15, color=_NORM)
    # The smoothed curve in front of the raw one.
    axes.set_zorder(norms.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_xlabel("optimizer step", fontsize=15)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    steps = [entry["step"] for entry in history if "step" in entry]
    if min(steps) == max(steps):
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    return norms


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain tick labels for a large range; else a linear one from 0."""
    if not wants_log(values):
        axes.set_ylim(bottom=min([0.0, *values]))
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    # Over few powers of ten these alone would be one or two ticks.
    between = (1, 2, 5) if max(values) / min(values) < _FEW_POWERS else (1,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=between, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curve(
    axes: Axes, history: Sequence[Mapping[str, Any]], key: str, label: str, color: str, *, smooth: bool = True
) -> None:
    found = points(history, key)
    if not found:
        return
    steps, values = zip(*found, strict=True)
    few = key.startswith("eval_") or len(found) <= _FEW
    if few or not smooth:
        axes.plot(steps, values, label=label, color=color, marker="o" if few else None, markersize=4, linewidth=2)
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    axes.plot(steps, smoothed(values), label=f"{label}, smoothed", color=color, linewidth=2)
