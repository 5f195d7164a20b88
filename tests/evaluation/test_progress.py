"""trainer_log.jsonl and loss.png."""

from __future__ import annotations

import json
import math

from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.evaluation.plots import plot_loss
from finetune.evaluation.progress import ProgressCallback


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
    log(callback, arguments, 1, loss=2.0, learning_rate=1e-4, grad_norm=math.nan, tokens_per_second=5.0)
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
        "tokens_per_second": 5.0,
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
    plot_loss([{"step": 1, "train_loss": 1.0}], path)
    assert not path.exists(), "nothing to draw"
    history = [
        {"step": 1, "loss": math.nan, "learning_rate": 1e-4, "grad_norm": math.inf},
        {"step": 2, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 1.0},
        {"step": 2, "eval_loss": 2.5},
    ]
    plot_loss(history, path)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    with Image.open(path) as image:
        assert image.width > image.height > 400
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
