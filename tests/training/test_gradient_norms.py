"""Gradient norms per part: before clipping, and together the total norm. Under ZeRO: tests/equivalence."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dataset import make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.training.freezing import adapt, part_of
from finetune.training.gradient_norms import PREFIX, GradientNormsCallback
from trainer import CPMTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Seen(TrainerCallback):
    """The norm of the gradients of every part as the optimizer is about to apply them, by step."""

    def __init__(self) -> None:
        self.norms: dict[int, dict[str, float]] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        squares: dict[str, float] = defaultdict(float)
        for name, weight in kwargs["model"].named_parameters():
            if weight.grad is not None:
                squares[part_of(name, resolved.parts)] += float(weight.grad.double().pow(2).sum())
        self.norms[state.global_step + 1] = {part: math.sqrt(square) for part, square in squares.items()}


resolved: Any = SimpleNamespace(parts=None)


def run(tiny, demo_data, tmp_path, *more: str) -> tuple[list[dict[str, Any]], dict[int, dict[str, float]]]:
    """The log of four steps, and what the optimizer got."""
    paths = ("--model_name_or_path", str(tiny("llama3_v2_5")), "--output_dir", str(tmp_path))
    quiet = ("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "4")
    quiet += ("--per_device_train_batch_size", "2", "--dataloader_num_workers", "0", "--learning_rate", "1e-4")
    args = parse_arguments([*paths, "--data_path", str(demo_data / "train.json"), *quiet, *more])
    base = resolve_base(args.model.model_name_or_path)
    resolved.parts = base.family.parts
    model = adapt(load_model(base.folder, dtype=torch.float32), base.family, args.training, args.lora)
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    data = make_supervised_data_module(args.data, encoder)
    rates = args.training.part_learning_rates
    seen = Seen()
    trainer = CPMTrainer(
        model=model, args=args.training, base=base, part_learning_rates=rates, callbacks=[seen], **data
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry], seen.norms


EVERY_SECOND = ("--logging_steps", "2", "--max_grad_norm", "0")


def parts_of(entry: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix(PREFIX): norm for name, norm in entry.items() if name.startswith(PREFIX)}


@pytest.mark.parametrize("limit", ["0", "0.01", "1000"])
def test_parts_are_those_before_clipping_and_add_up(tiny, demo_data, tmp_path, limit):
    logs, seen = run(tiny, demo_data, tmp_path, "--max_grad_norm", limit, "--weight_decay", "0.1")
    assert len(logs) == 4
    for entry in logs:
        parts, given = parts_of(entry), seen[entry["step"]]
        assert set(parts) == {"vision", "resampler", "llm"}
        assert math.hypot(*parts.values()) == pytest.approx(entry["grad_norm"], rel=1e-5)
        clipped = entry["grad_norm"] / math.hypot(*given.values())
        assert (clipped > 1.5) == (limit == "0.01"), "the limit is below the norm"
        assert parts == pytest.approx({part: clipped * norm for part, norm in given.items()}, rel=1e-4)


def test_adapters_and_a_part_trained_in_full(tiny, demo_data, tmp_path):
    logs, seen = run(tiny, demo_data, tmp_path, "--use_lora", "true", "--tune_vision", "false", *EVERY_SECOND)
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        assert parts_of(entry) == pytest.approx(seen[entry["step"]], rel=1e-4)
        assert set(parts_of(entry)) == {"resampler", "llm"}


def test_one_part_alone_has_the_total_norm(tiny, demo_data, tmp_path):
    only = ("--tune_vision", "false", "--tune_resampler", "false", "--tune_llm", "true")
    logs, _ = run(tiny, demo_data, tmp_path, *only)
    assert [parts_of(entry) for entry in logs] == [{}] * 4


def test_parts_that_do_not_add_up_are_not_logged(caplog):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    norms = GradientNormsCallback(Accelerator(cpu=True), sharded=False)
    norms.parts = ("llm", "vision")
    state, control = TrainerState(logging_steps=1), TrainerControl()
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    norms.on_train_begin(args, state, control, optimizer=optimizer)

    def step(total: float) -> dict[str, float]:
        norms.on_step_begin(args, state, control)
        for weight, value in zip(weights, (3.0, 4.0), strict=True):
            weight.grad = torch.tensor([value, 0.0])
        optimizer.step()
        return norms.log(total, 0)

    assert step(5.0) == pytest.approx({"grad_norm_llm": 3, "grad_norm_vision": 4})
    with caplog.at_level(logging.WARNING):
        assert step(7.0) == {}
        assert step(7.0) == {}
    assert caplog.text.count("together they are 5, the total norm is 7") == 1
    assert [step(total) for total in (math.nan, 0.0)] == [{}, {}]
