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


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses above, learning rate and gradient norm below, over optimizer steps; a PNG that is readable when small.

    Args:
        history: ``trainer.state.log_history``.
        path: the PNG to write, replaced in one go; nothing is written when no loss was logged.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    if not _points(history, "loss") and not _points(history, "eval_loss"):
        return
    figure, (losses, rates) = plt.subplots(
        2, 1, figsize=(7, 6.2), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    _curve(losses, history, "loss", "training loss", _TRAIN)
    _curve(losses, history, "eval_loss", "evaluation loss", _EVAL)
    losses.set_ylim(bottom=0)
    losses.set_ylabel("loss", fontsize=15)
    losses.legend(fontsize=14)
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
    for axes in (losses, rates, norms):
        axes.tick_params(labelsize=13)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=110, format="png")
    unfinished.replace(path)
    plt.close(figure)


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if key in entry and math.isfinite(entry[key])]


def _curve(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, label: str, color: str) -> None:
    points = _points(history, key)
    if not points:
        return
    steps, values = zip(*points, strict=True)
    mark = "o" if key == "eval_loss" or len(points) <= _FEW else None
    axes.plot(steps, values, label=label, color=color, marker=mark, markersize=4, linewidth=2)
