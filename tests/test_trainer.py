"""CPMTrainer in one process: learning rates, evaluation, throughput, the check of the base loss."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from dataset import DataCollator, SupervisedDataset, make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.training import base_loss
from finetune.training.base_loss import BaseLossError
from finetune.training.flops import flops_of
from finetune.training.freezing import adapt
from trainer import CPMTrainer


def make_trainer(base: Path, data: Path, output: Path, *flags: str) -> CPMTrainer:
    paths = ["--model_name_or_path", str(base), "--data_path", str(data / "train.json")]
    paths += ["--eval_data_path", str(data / "eval.json"), "--output_dir", str(output)]
    quiet = ["--dataloader_num_workers", "0", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
    args = parse_arguments([*paths, *quiet, *flags])
    checkpoint = resolve_base(str(base))
    tokenizer = load_tokenizer(base)
    torch.manual_seed(0)
    model = load_model(base, dtype=torch.float32)
    model = adapt(model, checkpoint.family, args.training, args.lora)
    encoder = Encoder(checkpoint.family, tokenizer, checkpoint.config, max_length=2048)
    return CPMTrainer(
        model=model,
        args=args.training,
        base=checkpoint,
        part_learning_rates=args.training.part_learning_rates,
        **make_supervised_data_module(args.data, encoder),
    )


def unwrapped(made: CPMTrainer) -> torch.nn.Module:
    assert isinstance(made.model, torch.nn.Module)
    return made.model


def test_every_part_has_its_learning_rate(tiny, demo_data, tmp_path):
    rates = ("--learning_rate", "1e-3", "--vision_lr", "2e-3", "--resampler_lr", "3e-3", "--weight_decay", "0.1")
    made = make_trainer(tiny("llama3_v2_5"), demo_data, tmp_path, *rates)
    optimizer = made.create_optimizer()
    names = {id(parameter): name for name, parameter in unwrapped(made).named_parameters()}
    expected = {"vpm": 2e-3, "resampler": 3e-3, "llm": 1e-3}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == expected[name.partition(".")[0]], name
            assert (group["weight_decay"] == 0) == (name.endswith("bias") or "norm" in name or ".ln_" in name), name
            seen.add(id(parameter))
    assert seen == {id(parameter) for parameter in unwrapped(made).parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("decay", "groups"), [("0", 3), ("0.1", 6)])
def test_a_group_has_one_part_and_all_of_it_that_can_share_one(tiny, demo_data, tmp_path, decay, groups):
    made = make_trainer(tiny("llama3_v2_5"), demo_data, tmp_path, "--learning_rate", "1e-3", "--weight_decay", decay)
    found = [group for group in made.create_optimizer().param_groups if group["params"]]
    trained = sum(parameter.requires_grad for parameter in unwrapped(made).parameters())
    assert sum(len(group["params"]) for group in found) == trained
    names = {id(parameter): name.partition(".")[0] for name, parameter in unwrapped(made).named_parameters()}
    parts = [{names[id(parameter)] for parameter in group["params"]} for group in found]
    assert [len(own) for own in parts] == [1] * groups
    assert len({(own.pop(), group["weight_decay"]) for own, group in zip(parts, found, strict=True)}) == groups


def test_evaluation_is_weighted_by_tokens_at_any_batch_size(tiny, demo_data, tmp_path):
    losses = []
    for size in ("1", "3", "8"):
        made = make_trainer(tiny("llama3_v2_5"), demo_data, tmp_path, "--per_device_eval_batch_size", size)
        metrics = made.evaluate()
        losses.append(metrics["eval_loss"])
    examples, collator = made.eval_dataset, made.data_collator
    assert isinstance(examples, SupervisedDataset)
    assert isinstance(collator, DataCollator)
    total = count = 0.0
    for index in range(len(examples)):
        batch = collator([examples[index]])
        assert batch.pop("sources") == [examples[index].source]
        with torch.no_grad():
            nll, tokens = unwrapped(made).eval()(**batch).row_loss.sum(0).tolist()
        total, count = total + nll, count + tokens
    assert metrics["eval_tokens"] == count
    for loss in losses:
        assert loss == pytest.approx(total / count, abs=1e-5)


def test_logs_carry_throughput_and_the_base_loss_is_reported(tiny, demo_data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made = make_trainer(tiny("v2_0"), demo_data, tmp_path, "--max_steps", "2", "--learning_rate", "1e-3")
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["samples_per_second"] > 0
        assert entry["tokens_per_second"] > 0
        assert 0 < entry["data_wait"] < 1, "the samples are prepared between the steps here"
        assert entry["tflops_per_second"] > 0
        assert not {"mfu", "peak_memory_gb"} & set(entry), "only where there is a GPU"
    assert made.base_loss == pytest.approx(logs[0]["loss"], abs=1e-4)
    assert f"base loss at step 0: {made.base_loss:.4f}" in caplog.text


def test_total_flos_are_the_operations_of_the_cost_model(tiny, demo_data, tmp_path):
    flags = ("--use_lora", "true", "--tune_llm", "false", "--max_steps", "3", "--logging_steps", "1")
    made = make_trainer(tiny("llama3_v2_5"), demo_data, tmp_path, *flags, "--train_sampling_strategy", "sequential")
    made.train()
    batches = list(made.get_train_dataloader())[:3]
    flops = flops_of(made.model, made.base.family)
    assert len(batches) == 3
    counts = [{name: int(value) for name, value in flops.counts(batch).items()} for batch in batches]
    assert made.state.total_flos == pytest.approx(sum(map(flops.of, counts)))
    assert made.state.total_flos > 0


def test_a_pretrained_checkpoint_at_chance_stops(tiny, demo_data, tmp_path, monkeypatch):
    monkeypatch.setattr(base_loss, "SMALLEST_PRETRAINED", 1000)
    made = make_trainer(tiny("v2_0"), demo_data, tmp_path, "--max_steps", "1")
    before = {name: parameter.detach().clone() for name, parameter in unwrapped(made).named_parameters()}
    with pytest.raises(BaseLossError, match=rf"near ln\(vocabulary\) = {math.log(832):.2f}.*--check_base_loss off"):
        made.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in unwrapped(made).named_parameters())
