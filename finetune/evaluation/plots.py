"""Pictures of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stay apart for colour-blind readers and in grey.
_TRAIN, _EVAL, _RATE, _NORM = "#4477aa", "#cc3311", "#228833", "#aa7744"
# Up to so many points each gets a mark: a run of one step shows something too.
_FEW = 30


# What an evaluation logs beside its loss and the metric of --eval_generate.
_COUNTS = ("eval_loss", "eval_tokens", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
_COUNTS += ("eval_model_preparation_time",)


def metric_names(entry: Mapping[str, Any]) -> list[str]:
    """The keys of a log entry that --eval_generate gave."""
    return [key for key in entry if key.startswith("eval_") and key not in _COUNTS]


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses above, learning rate and gradient norm below, over optimizer steps; a PNG that is readable when small.

    Between them, where there are any, the first two figures of --eval_generate.

    Args:
        history: ``trainer.state.log_history``.
        path: the PNG to write, replaced in one go; nothing is written when no loss was logged.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    if not _points(history, "loss") and not _points(history, "eval_loss"):
        return
    generated = list(dict.fromkeys(name for entry in history for name in metric_names(entry)))[:2]
    heights = (3, 2, 2) if generated else (3, 2)
    figure, panels = plt.subplots(
        len(heights),
        1,
        figsize=(7, 2.1 + 2.05 * len(heights)),
        sharex=True,
        height_ratios=heights,
        layout="constrained",
    )
    losses, rates = panels[0], panels[-1]
    _curve(losses, history, "loss", "training loss", _TRAIN)
    _curve(losses, history, "eval_loss", "evaluation loss", _EVAL)
    losses.set_ylim(bottom=0)
    losses.set_ylabel("loss", fontsize=15)
    losses.legend(fontsize=14)
    for name, color in zip(generated, (_EVAL, _NORM), strict=False):
        _curve(panels[1], history, name, name.removeprefix("eval_"), color)
        panels[1].set_ylabel("answers", fontsize=15)
        panels[1].legend(fontsize=14)
    _curve(rates, history, "learning_rate", "learning rate", _RATE)
    rates.set_ylabel("learning rate", fontsize=15, color=_RATE)
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norms = rates.twinx()
    _curve(norms, history, "grad_norm", "gradient norm", _NORM)
    norms.set_ylabel("gradient norm", fontsize=15, color=_NORM)
    norms.set_ylim(bottom=0)
    # The smooth curve in front of the jagged one.
    rates.set_zorder(norms.get_zorder() + 1)
    rates.patch.set_visible(False)
    rates.set_xlabel("optimizer step", fontsize=15)
    rates.xaxis.get_major_locator().set_params(integer=True)
    for axes in (*panels, norms):
        axes.tick_params(labelsize=13)
    for axes in panels:
        axes.grid(alpha=0.3)
    unfinished = path.with_name(f".{path.name}")
    try:
        figure.savefig(unfinished, dpi=110, format="png")
        unfinished.replace(path)
    finally:
        plt.close(figure)


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry and math.isfinite(entry[key])]


def _curve(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, label: str, color: str) -> None:
    points = _points(history, key)
    if not points:
        return
    steps, values = zip(*points, strict=True)
    mark = "o" if key.startswith("eval_") or len(points) <= _FEW else None
    axes.plot(steps, values, label=label, color=color, marker=mark, markersize=4, linewidth=2)
