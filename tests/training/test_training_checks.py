"""TrainingChecks in one process: its errors, skipped updates, and no false positives."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dataset import make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.runtime import outcome
from finetune.runtime.signals import SignalWatch
from finetune.training.freezing import adapt
from finetune.training.graceful_stop import StoppedError
from finetune.training.training_checks import DeadPartError, NoLabelError, NonFiniteError, affects_loss
from trainer import CPMTrainer

Make = Callable[..., CPMTrainer]
LORA = ("--use_lora", "true", "--lora_r", "4", "--lora_dropout", "0")


@pytest.fixture
def make(tiny, demo_data, tmp_path) -> Make:
    """Builds a trainer on the demo records in their order."""

    def made(*flags: str, family: str = "llama3_v2_5", data: Path | None = None, frozen: str = "") -> CPMTrainer:
        base = tiny(family)
        paths = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "out")]
        paths += ["--data_path", str((data or demo_data) / "train.json"), "--train_sampling_strategy", "sequential"]
        quiet = ["--dataloader_num_workers", "0", "--save_strategy", "no", "--report_to", "none"]
        quiet += ["--disable_tqdm", "true", "--learning_rate", "1e-3", "--weight_decay", "0.1"]
        args = parse_arguments([*paths, *quiet, "--max_steps", "4", *flags])
        checkpoint = resolve_base(str(base))
        model = adapt(load_model(base, dtype=torch.float32), checkpoint.family, args.training, args.lora)
        if frozen:
            model.get_submodule(frozen).requires_grad_(False)
        encoder = Encoder(checkpoint.family, load_tokenizer(base), checkpoint.config, max_slice_nums=1)
        return CPMTrainer(
            model=model,
            args=args.training,
            base=checkpoint,
            part_learning_rates=args.training.part_learning_rates,
            **make_supervised_data_module(args.data, encoder),
        )

    return made


def unwrapped(trainer: CPMTrainer) -> nn.Module:
    assert isinstance(trainer.model, nn.Module)
    return trainer.model


def spoil(trainer: CPMTrainer, when: Callable[[int], bool], module: str = "resampler") -> None:
    """The result of a module is NaN in some steps, counted from 1."""

    def ruin(_: nn.Module, __: object, result: torch.Tensor) -> torch.Tensor:
        return result * torch.nan if when(trainer.state.global_step + 1) else result

    unwrapped(trainer).get_submodule(module).register_forward_hook(ruin)


def spoil_gradient(trainer: CPMTrainer, when: Callable[[int], bool]) -> None:
    def ruin(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf if when(trainer.state.global_step + 1) else gradient

    unwrapped(trainer).get_parameter("llm.lm_head.weight").register_hook(ruin)


def weights(trainer: CPMTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in unwrapped(trainer).named_parameters()}


def hooks(trainer: CPMTrainer) -> int:
    return sum(len(p._backward_hooks or ()) for p in unwrapped(trainer).parameters())


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5"])
@pytest.mark.parametrize("flags", [(), LORA, (*LORA, "--tune_resampler", "false")])
def test_a_good_run_is_silent_and_the_hooks_go(make, caplog, family, flags):
    trainer = make(*flags, family=family)
    assert hooks(trainer) > 0
    trainer.train()
    assert hooks(trainer) == 0
    assert "not finite" not in caplog.text
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("module", "named"), [("vpm", "the vision tower"), ("resampler", "the vision tower and the r")]
)
def test_a_detached_part_is_named(make, module, named):
    trainer = make()
    unwrapped(trainer).get_submodule(module).register_forward_hook(lambda _, __, result: result.detach())
    with pytest.raises(DeadPartError, match=f"^{named}.*--tune_vision false"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(("part", "module"), [("vision tower", "vpm"), ("resampler", "resampler"), ("LLM", "llm")])
def test_a_part_frozen_by_accident_is_named(make, part, module):
    trainer = make()
    unwrapped(trainer).get_submodule(module).requires_grad_(False)
    with pytest.raises(DeadPartError, match=f"^the {part} should train"):
        trainer.train()


def test_a_part_frozen_before_the_trainer_is_named(make):
    with pytest.raises(DeadPartError, match="^the vision tower should train"):
        make(frozen="vpm").train()


def test_text_alone_blames_no_tower(make, tmp_path):
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    records = [{"id": str(index), "conversations": turns} for index in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    trainer = make(data=tmp_path)
    trainer.train()
    assert trainer.state.global_step == 4


def test_an_image_behind_the_last_label_is_not_used():
    labels = torch.tensor([[-100, 5, -100, -100, -100], [-100, -100, -100, 5, -100]])
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert not affects_loss({"labels": labels, "image_bound": none}, "image_bound")
    assert not affects_loss({"labels": labels, "image_bound": torch.tensor([[0, 2, 4]])}, "image_bound")
    assert affects_loss({"labels": labels, "image_bound": torch.tensor([[0, 2, 4], [1, 1, 3]])}, "image_bound")


@pytest.mark.parametrize("fault", [spoil, spoil_gradient])
def test_the_run_stops_after_some_nonfinite_steps_and_names_samples(make, caplog, fault):
    caplog.set_level(logging.WARNING)
    trainer = make("--max_nonfinite_steps", "2", "--gradient_accumulation_steps", "2")
    fault(trainer, lambda step: step >= 2)
    what = "loss" if fault is spoil else "gradient"
    with pytest.raises(NonFiniteError, match=rf"the {what} was not finite in 2 steps in a row \(2 to 3\)") as stop:
        trainer.train()
    message = str(stop.value)
    assert "Samples of step 3: " in message
    assert "record 4" in message
    assert "record 5" in message
    assert "record 3" not in message
    assert "--learning_rate is 0.001" in message
    assert f"step 2: the {what} is not finite" in caplog.text
    assert "record 2" in caplog.text
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_only_the_rows_whose_loss_is_not_finite_are_named(make):
    trainer = make("--max_nonfinite_steps", "1", "--per_device_train_batch_size", "4")
    unwrapped(trainer).get_submodule("llm.model").register_forward_hook(lambda _, __, result: poison_row(result, 2))
    with pytest.raises(
        NonFiniteError, match=r"in step 1\. Samples of step 1: [^;]*record 2 [^;]*\. Likely causes: a dam"
    ):
        trainer.train()


def poison_row(result, row: int):
    result.last_hidden_state = result.last_hidden_state.clone()
    result.last_hidden_state[row] = torch.nan
    return result


@pytest.mark.parametrize("fault", [spoil, spoil_gradient])
def test_a_nonfinite_step_changes_no_weight(make, fault):
    """Neither by the update nor by weight decay or momentum; what is logged is NaN in that step only."""
    trainer = make("--max_nonfinite_steps", "0", "--lr_scheduler_type", "constant")
    fault(trainer, lambda step: step in (2, 3))
    seen = []
    original = trainer.log
    trainer.log = lambda *args: (seen.append(weights(trainer)), original(*args))[1]
    trainer.train()
    for name, value in seen[0].items():
        assert torch.equal(value, seen[1][name]), name
        assert torch.equal(value, seen[2][name]), name
    assert any(not torch.equal(value, seen[3][name]) for name, value in seen[0].items())
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [math.isfinite(entry["loss"]) for entry in logs] == [True, False, False, True]


def test_weights_that_are_not_finite_are_named(make):
    trainer = make()
    with torch.no_grad():
        unwrapped(trainer).get_parameter("resampler.kv_proj.weight")[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"1 to 3.*weights that are not finite: resampler\.kv_proj\.weight"):
        trainer.train()


def test_a_run_without_a_label_stops(make, monkeypatch):
    """One sample per step: a few consecutive ones may be skipped by chance, eight not."""
    trainer = make("--max_steps", "20")
    collate = trainer.data_collator
    monkeypatch.setattr(trainer, "data_collator", lambda samples: unlabelled(collate(samples)))
    with pytest.raises(NoLabelError, match=r"step 8: the last 8 samples have no token with a label.*train\.json, rec"):
        trainer.train()
    assert NoLabelError.exit_code == 4


def unlabelled(batch: dict) -> dict:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def test_a_run_that_is_asked_to_stop_saves_at_the_end_of_the_step(make, monkeypatch, tmp_path):
    trainer = make()
    watch = SignalWatch(pytest.fail)
    monkeypatch.setattr(watch, "saved", lambda: None)  # this process is not to end
    monkeypatch.setattr(outcome, "watch", watch)
    spoil(trainer, lambda step: step == 2 and setattr(outcome.watch, "_request", "SIGTERM") is not None)
    with pytest.raises(StoppedError, match="step 2 of 4 is saved"):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "checkpoint-3").exists()
