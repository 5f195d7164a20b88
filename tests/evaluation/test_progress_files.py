"""trainer_log.jsonl and loss.png."""

from __future__ import annotations

import json
import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.evaluation import plots
from finetune.evaluation.plots import plot_training_curves
from finetune.evaluation.progress_files import ProgressCallback


def begin(callback: ProgressCallback, arguments: TrainingArguments, step: int) -> None:
    callback.on_train_begin(arguments, TrainerState(global_step=step), TrainerControl())


def log(callback: ProgressCallback, arguments: TrainingArguments, step: int, **logs) -> None:
    callback.on_log(arguments, TrainerState(global_step=step, max_steps=10, epoch=0.5), TrainerControl(), logs=logs)


def lines(arguments: TrainingArguments) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    path = f"{arguments.output_dir}/trainer_log.jsonl"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line, parse_constant=refuse) for line in file]


def test_the_log_has_a_line_per_event_and_goes_on_after_a_resume(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback = ProgressCallback()
    begin(callback, arguments, 0)
    log(callback, arguments, 1, loss=2.0, learning_rate=1e-4, grad_norm=math.nan, grad_norm_llm=3.0, mfu=0.5)
    log(callback, arguments, 2, eval_loss=1.5, eval_runtime=3)
    log(callback, arguments, 2, something_else=1)
    log(callback, arguments, 3, loss=math.inf)
    first, second, third = lines(arguments)
    assert first.pop("elapsed") >= 0
    assert first.pop("eta") >= 0
    assert first == {
        "step": 1,
        "total_steps": 10,
        "epoch": 0.5,
        "loss": 2.0,
        "lr": 1e-4,
        "grad_norm": None,
        "grad_norm_llm": 3.0,
        "mfu": 0.5,
    }
    assert (second["step"], second["eval_loss"]) == (2, 1.5)
    assert third["loss"] is None
    with (tmp_path / "trainer_log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = ProgressCallback()
    begin(resumed, arguments, 2)
    log(resumed, arguments, 3, loss=1.0)
    assert [(line["step"], line.get("loss")) for line in lines(arguments)] == [(1, 2.0), (2, None), (3, 1.0)]
    begin(ProgressCallback(), arguments, 0)
    assert lines(arguments) == []


def test_the_plot_is_drawn_also_with_numbers_that_are_not_finite(tmp_path):
    path = tmp_path / "loss.png"
    plot_training_curves([{"step": 1, "train_loss": 1.0}], path)
    assert not path.exists(), "nothing to draw"
    history = [
        {"step": 1, "loss": math.nan, "learning_rate": 1e-4, "grad_norm": math.inf},
        {"step": 2, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 1.0},
        {"step": 2, "eval_loss": 2.5},
    ]
    plot_training_curves(history, path)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    with Image.open(path) as image:
        assert image.width > image.height > 400
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, as they are when they are written."""
    from matplotlib import figure

    figures = []

    class Kept(figure.Figure):
        def savefig(self, *args, **kwargs) -> None:
            super().savefig(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    return figures


def run_of(values: list[float], **more: float) -> list[dict]:
    return [{"step": step + 1, "loss": value, "learning_rate": 1e-4, **more} for step, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "scale"),
    [([2.0, 1.0, 0.5], "linear"), ([4.0, 1.0, 0.05], "log"), ([4.0, 0.0, 0.05], "linear"), ([1e-6] * 3, "linear")],
)
def test_the_axis_is_logarithmic_where_the_range_asks_for_it(values, scale, tmp_path, drawn):
    plot_training_curves(run_of(values, grad_norm=1.0), tmp_path / "loss.png")
    assert drawn[0].axes[0].get_yscale() == scale


def test_nothing_is_clipped_whatever_the_name_and_the_numbers(tmp_path, drawn):
    folder = tmp_path / ("$x_{" + "w" * 150)
    folder.mkdir()
    values = [5 * 0.97**step + (100 if step == 50 else 0) for step in range(200)]
    history = run_of(values, grad_norm=123456.789) + [{"step": 200, "eval_loss": 3.0, "eval_anls": 0.5}]
    plot_training_curves(history, folder / "loss.png")
    (figure,) = drawn
    FigureCanvasAgg(figure)
    width, height = figure.canvas.get_width_height()
    renderer = figure.canvas.get_renderer()
    boxes = [figure.get_tightbbox(renderer).transformed(figure.dpi_scale_trans)]
    boxes += [text.get_window_extent(renderer) for text in figure.texts]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    for axes in figure.axes:
        low, high = axes.get_ylim()
        for line in axes.lines:
            assert low <= min(line.get_ydata())
            assert max(line.get_ydata()) <= high
    losses = [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert losses == ["training, smoothed", "evaluation"]


def test_few_points_are_not_smoothed(tmp_path, drawn):
    plot_training_curves(run_of([3.0, 1.0, 2.0]), tmp_path / "loss.png")
    (line,) = drawn[0].axes[0].lines
    assert list(line.get_ydata()) == [3.0, 1.0, 2.0]
    assert plots.points([{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}], "loss") == [(2, 1.0)]


def test_figures_of_pairs_are_logged_and_drawn_and_are_no_answers(tmp_path, monkeypatch):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    callback, named = ProgressCallback(), {"rewards/accuracies": 0.5, "rewards/margins": -0.1, "length/chosen": 7.0}
    begin(callback, arguments, 0)
    log(callback, arguments, 1, loss=0.7, **named)
    log(callback, arguments, 2, eval_loss=0.6, **{f"eval_{name}": value for name, value in named.items()})
    first, second = lines(arguments)
    assert named.items() <= first.items()
    assert {f"eval_{name}": value for name, value in named.items()}.items() <= second.items()
    assert plots.metric_names(second) == []
    drawn = []
    monkeypatch.setattr(plots, "_curve", lambda axes, history, key, *_, **__: drawn.append(key))
    plot_training_curves([{"step": 1, **first}, {"step": 2, **second}], tmp_path / "loss.png")
    assert {"rewards/accuracies", "eval_rewards/accuracies"} <= set(drawn)
