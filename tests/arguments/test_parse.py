"""Parsing of flags: defaults, refused combinations, warnings of flags without effect."""

from __future__ import annotations

import json
import logging
import os

import pytest

from finetune.arguments.parse import parse_arguments
from finetune.utils.errors import ArgumentError

REQUIRED = ["--model_name_or_path", "m", "--data_path", "d"]


def parse(*flags: str):
    return parse_arguments([*REQUIRED, *flags])


def test_defaults_learn():
    full, lora = parse().training, parse("--use_lora", "true").training
    assert (full.learning_rate, full.vision_lr, full.resampler_lr) == (1e-5, pytest.approx(2e-6), 1e-5)
    assert (lora.learning_rate, lora.vision_lr, lora.resampler_lr) == (1e-4, pytest.approx(2e-5), 1e-4)
    assert full.tune_llm
    assert full.tune_vision
    assert not lora.tune_vision


def test_low_lora_rate_warns(caplog):
    parse("--use_lora", "true", "--learning_rate", "1e-6")
    assert "low for LoRA" in caplog.text


def test_flags_without_effect_warn(caplog):
    parse("--lora_r", "8", "--tune_vision", "false", "--vision_lr", "1e-6")
    assert "--lora_r: no effect without --use_lora" in caplog.text
    assert "--vision_lr has no effect" in caplog.text


def test_tune_llm_false_without_lora_is_legal_and_warned_about(caplog):
    assert not parse("--tune_llm", "false").training.tune_llm
    assert "the LLM is frozen" in caplog.text


def test_precision_on_a_machine_without_gpu(caplog, monkeypatch):
    monkeypatch.setattr("finetune.arguments.training.is_torch_cuda_available", lambda: False)
    training = parse("--fp16", "true").training
    assert not training.fp16
    assert training.compute_dtype == "float32"
    assert sum("fp32 on the CPU" in record.message for record in caplog.records) == 1
    with pytest.raises(ArgumentError, match="choose one"):
        parse("--fp16", "true", "--bf16", "true")


def test_deepspeed_blocks_that_override_flags_are_dropped(tmp_path, caplog):
    config = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    training = parse("--deepspeed", str(path)).training
    assert isinstance(training.deepspeed, dict)
    assert set(training.deepspeed) & {"optimizer", "scheduler"} == set()
    assert "'scheduler' block is ignored, it would override --lr_scheduler_type" in caplog.text


def test_deepspeed_config_that_is_missing_or_broken(tmp_path):
    with pytest.raises(ArgumentError, match=r"no_such\.json: no such file"):
        parse("--deepspeed", str(tmp_path / "no_such.json"))
    (tmp_path / "broken.json").write_text("{,}")
    with pytest.raises(ArgumentError, match="not valid JSON"):
        parse("--deepspeed", str(tmp_path / "broken.json"))


def test_evaluation_needs_data():
    with pytest.raises(ArgumentError, match="none of --eval_data_path"):
        parse("--eval_strategy", "steps", "--eval_steps", "1")


def test_unknown_flags_are_refused():
    with pytest.raises(ArgumentError, match=r"--lora_modules_to_sav_e \(did you mean --lora_modules_to_save\?\)"):
        parse("--lora_modules_to_sav_e", "8")


def test_recorded_flags_are_plain_and_without_secrets(caplog):
    caplog.set_level(logging.ERROR)
    recorded = parse("--use_lora", "true", "--lr_scheduler_type", "cosine", "--hub_token", "secret").non_defaults()
    assert recorded["lr_scheduler_type"] == "cosine"
    assert recorded["learning_rate"] == 1e-4
    assert "secret" not in json.dumps(recorded)


def test_flags_of_published_launchers_are_mapped_or_named(caplog, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")  # so that the value of this test goes with it
    published = "--prediction_loss_only false --fp16_full_eval true --logging_dir logs --warmup_ratio 0.01"
    training = parse(*published.split(), "--evaluation_strategy=no", "--save_safetensors", "--do_train").training
    assert training.warmup_steps == 0.01
    assert training.do_train
    assert training.eval_strategy == "no"
    assert not training.fp16_full_eval
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"
    for flag in ("fp16_full_eval", "logging_dir", "warmup_ratio", "evaluation_strategy", "save_safetensors"):
        assert f"--{flag} " in caplog.text, flag
    assert "prediction_loss_only" not in caplog.text
    assert parse("--warmup_ratio", "0.5", "--warmup_steps", "7").training.warmup_steps == 7
    for words, order in (("--group_by_length", "group_by_length"), ("--group_by_length false", "random")):
        assert parse(*words.split()).training.train_sampling_strategy == order
    assert "--group_by_length is now --train_sampling_strategy group_by_length" in caplog.text


def test_checkpointing_is_one_flag_with_two_names(recwarn):
    """transformers has renamed it; what the launchers say is not deprecated to their users."""
    for flags in (("--gradient_checkpointing", "true"), ("--gradient_checkpointing_kwargs", '{"use_reentrant": true}')):
        training = parse(*flags).training
        old, value = flags[0].removeprefix("--"), getattr(training, flags[0].removeprefix("--"))
        assert value in (True, {"use_reentrant": True})
        assert getattr(training, old.replace("gradient", "activation"), value) == value
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]
    if hasattr(training, "activation_checkpointing"):
        with pytest.raises(ArgumentError, match="are one flag: give one of them"):
            parse("--gradient_checkpointing", "true", "--activation_checkpointing", "false")
