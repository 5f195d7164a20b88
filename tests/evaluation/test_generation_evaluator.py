"""--eval_generate: the figures are those of evaluate, wherever a run shows them."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from PIL import Image

from dataset import make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.evaluation.batched_generation import generate_answers, split_answer
from finetune.evaluation.generation_evaluator import GenerationEvaluator
from finetune.evaluation.metrics import METRICS, MetricError
from finetune.evaluation.plots import plot_training_curves
from finetune.evaluation.progress_files import ProgressCallback
from finetune.models import load_model, load_tokenizer
from finetune.readers import read
from finetune.sample import DataError
from finetune.training.freezing import adapt
from finetune.utils.errors import ArgumentError
from trainer import CPMTrainer


def make_trainer(base, data, output, *flags) -> CPMTrainer:
    words = ["--model_name_or_path", base, "--data_path", data / "train.json", "--eval_data_path", data / "eval.json"]
    words += ["--output_dir", output, "--dataloader_num_workers", "0", "--report_to", "none", "--disable_tqdm", "true"]
    args = parse_arguments([*map(str, words), *flags])
    checkpoint = resolve_base(str(base))
    torch.manual_seed(0)
    model = adapt(load_model(base, dtype=torch.float32), checkpoint.family, args.training, args.lora)
    encoder = Encoder(checkpoint.family, load_tokenizer(base), checkpoint.settings, max_length=2048)
    return CPMTrainer(
        model=model,
        args=args.training,
        base=checkpoint,
        part_learning_rates=args.training.part_learning_rates,
        callbacks=[ProgressCallback()],
        **make_supervised_data_module(args.data, encoder),
    )


def test_the_metric_is_logged_and_chooses_the_best(tiny, demo_data, tmp_path):
    flags = ["--eval_generate", "4", "--eval_metric", "cer", "--eval_max_new_tokens", "5", "--max_steps", "2"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "best", "--learning_rate", "1e-2"]
    flags += ["--metric_for_best_model", "cer", "--greater_is_better", "false", "--gradient_checkpointing", "true"]
    made = make_trainer(tiny("v2_0"), demo_data, tmp_path, *flags)
    made.train()
    values = [entry["eval_cer"] for entry in made.state.log_history if "eval_cer" in entry]
    assert len(values) == 2
    assert made.state.best_metric == min(values)
    lines = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["eval_cer"] for line in lines if "eval_cer" in line] == values
    samples = read(demo_data / "eval.json")
    pairs = [split_answer(samples[place * len(samples) // 4]) for place in range(4)]
    encoder = Encoder(made.base.family, load_tokenizer(made.base.folder), made.base.settings)
    model = made.accelerator.unwrap_model(made.model)
    assert isinstance(model, torch.nn.Module)
    answers = generate_answers(model, encoder.tokenizer, encoder, [prompt for prompt, _ in pairs], max_new_tokens=5)
    metric = METRICS["cer"]
    scores = [metric.score(answer, [pair[1]]) for answer, pair in zip(answers, pairs, strict=True)]
    assert made.evaluate()["eval_cer"] == metric.combine(scores)["cer"]


def test_the_same_on_every_number_of_ranks(tiny, demo_data, monkeypatch):
    base = resolve_base(str(tiny("v2_0")))
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings, max_length=30)
    model = load_model(base.folder, dtype=torch.float32).train()
    samples = read(demo_data / "eval.json")
    asked = GenerationEvaluator(samples, encoder, count=5, metric="cer", max_new_tokens=4, batch_size=2)
    alone = asked(model)
    assert model.training, "training goes on in its mode"
    parts: list[list] = []
    monkeypatch.setattr(
        "finetune.evaluation.generation_evaluator.gather_object", lambda scores: parts.append(scores) or scores
    )
    calls = []
    monkeypatch.setattr(
        "finetune.evaluation.generation_evaluator.answer_batch",
        lambda *args, real=GenerationEvaluator.__call__.__globals__["answer_batch"], **kwargs: (
            calls.append(1) or real(*args, **kwargs)
        ),
    )
    for rank in range(4):
        calls.clear()
        if rank < 3:
            asked(model, rank=rank, world=3)
            assert len(calls) == 1, "every rank generates as often as the others"
    # Each question is answered once, whoever is asked.
    given = sorted(pair for part in parts for pair in part)
    assert [place for place, _ in given] == list(range(5))
    scores = [METRICS["cer"].figures(text, [asked.answered[place].reference]) for place, text in given]
    assert METRICS["cer"].combine(scores) == alone


def test_the_first_and_the_newest_answers_are_kept(tiny, demo_data, monkeypatch):
    base = resolve_base(str(tiny("v2_0")))
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    asked = GenerationEvaluator(read(demo_data / "eval.json"), encoder, count=3, metric="cer", batch_size=2)
    for step in (0, 10, 20):
        said = [f"{step} {number}" for number in (0, 1)]
        monkeypatch.setattr(
            "finetune.evaluation.generation_evaluator.answer_batch", lambda *args, said=said, **_: said[: len(args[3])]
        )
        asked(torch.nn.Identity(), step=step)
    assert [sorted(each.answers) for each in asked.answered] == [[0, 20]] * 3
    assert {each.answers[20] for each in asked.answered} == {"20 0", "20 1"}


def test_what_cannot_be_asked_is_told_before_training(tiny, demo_data, tmp_path, caplog):
    with pytest.raises(MetricError, match="unknown metric 'nothing'"):
        make_trainer(tiny("v2_0"), demo_data, tmp_path, "--eval_generate", "2", "--eval_metric", "nothing")
    with pytest.raises(ArgumentError, match="give --eval_data_path"):
        parse_arguments(["--model_name_or_path", "m", "--data_path", "d", "--eval_generate", "2"])
    base = resolve_base(str(tiny("v2_0")))
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    (tmp_path / "empty.png").write_bytes(b"")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [{"image": "empty.png", "conversations": turns}, {"conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    samples = read(tmp_path / "data.json")
    caplog.set_level(logging.INFO)
    GenerationEvaluator(samples, encoder, count=9, skip_bad=True)
    assert "skipped in eval_generate" in caplog.text
    assert "eval_normalised (auto: short references (median 1 words)) on 1 evaluation samples" in caplog.text
    with pytest.raises(DataError, match="none of the chosen"):
        GenerationEvaluator(samples[:1], encoder, count=1, skip_bad=True)


def test_the_plot_has_a_panel_for_it(tmp_path):
    history = [{"step": 1, "loss": 2.0, "learning_rate": 1e-4}, {"step": 1, "eval_loss": 2.5}]
    plot_training_curves(history, tmp_path / "without.png")
    figures = {"eval_box_iou": 0.5, "eval_acc@0.2": 1.0, "eval_runtime": 3.0, "eval_tokens": 9}
    plot_training_curves([*history, {"step": 1, "eval_loss": 2.0, **figures}], tmp_path / "with.png")
    with Image.open(tmp_path / "without.png") as before, Image.open(tmp_path / "with.png") as after:
        assert after.height > before.height
