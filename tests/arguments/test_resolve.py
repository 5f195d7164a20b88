"""Precedence of command line, YAML file and defaults; LLaMA-Factory's keys; origins of values."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest
import yaml

from finetune.arguments.parse import Arguments, parse_arguments
from finetune.arguments.preference import PreferenceOptions, options_of
from finetune.utils.errors import ArgumentError

BASE = {"model_name_or_path": "m", "stage": "sft", "dataset": "d"}


@pytest.fixture
def parse(tmp_path):
    """Parses a file of these values with some words behind it."""

    def run(values: dict[str, Any] | str, *words: str) -> Arguments:
        path = tmp_path / "x.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return parse_arguments([str(path), *words])

    return run


def test_command_line_over_file_over_defaults(parse):
    given = {"model_name_or_path": "m", "data_path": "d", "learning_rate": 3e-5, "max_steps": 7, "use_lora": True}
    args = parse(given, "--learning_rate", "1e-3", "--lora_parts", "llm", "vision", "seed=7")
    assert (args.training.learning_rate, args.training.max_steps, args.training.seed) == (1e-3, 7, 7)
    assert args.training.lora_parts == ["llm", "vision"]
    # no key of LLaMA-Factory: our defaults
    assert (args.lora.lora_r, args.training.per_device_train_batch_size, args.training.tune_resampler) == (64, 1, True)
    assert args.origin("learning_rate") == "command line"
    assert args.origin("max_steps").endswith("x.yaml: max_steps")
    assert args.origin("vision_lr") == "derived"
    lines = dict(line.split(maxsplit=1) for line in args.describe().splitlines())
    assert lines["learning_rate"] == "0.001"
    assert lines["lora_parts"] == "llm vision"
    assert lines["max_steps"].endswith("x.yaml)")
    assert "vision_lr" not in lines


def test_flags_of_the_launcher_are_told_apart(monkeypatch):
    """The last FINETUNE_USER_ARGS arguments are the user's; what the launcher alone gave is its default."""
    launcher = ["--weight_decay", "0.1", "--learning_rate", "1e-4", "--warmup_steps", "0.01"]
    own = ["--model_name_or_path", "m", "--data_path", "d", "--learning_rate=1e-4", "--use_lora", "true"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *launcher, *own])
    monkeypatch.setenv("FINETUNE_USER_ARGS", str(len(own)))
    args = parse_arguments()
    assert [args.origin(name) for name in ("weight_decay", "warmup_steps")] == ["launcher default"] * 2
    assert args.origin("learning_rate") == "command line"
    assert "learning_rate" in args.describe()
    assert "weight_decay" not in args.describe()
    assert "  weight_decay: 0.1  # launcher default\n" in args.to_yaml()
    monkeypatch.delenv("FINETUNE_USER_ARGS")
    assert parse_arguments().origin("weight_decay") == "command line"


def test_a_file_in_their_keys_takes_their_defaults(parse, caplog):
    caplog.set_level(logging.INFO)
    args = parse(BASE)
    training, lora, data = args.training, args.lora, args.data
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_target_modules) == (8, 16, 0.0, "all-linear")
    assert (training.use_lora, training.tune_vision, training.tune_resampler) == (True, False, False)
    assert (training.model_max_length, training.learning_rate, training.per_device_train_batch_size) == (2048, 5e-5, 8)
    assert training.gradient_checkpointing
    assert training.logging_steps == 500
    # the one exception, and it is said
    assert data.image_max_pixels is None
    assert "images are not resized" in caplog.text
    assert args.origin("lora_r") == "LLaMA-Factory's default of lora_rank"
    assert parse({**BASE, "image_max_pixels": 4096}).data.image_max_pixels == 4096


def test_the_command_line_wins_over_their_keys_in_either_name(parse):
    args = parse({**BASE, "lora_rank": 4, "cutoff_len": 99}, "--lora_r", "32", "--cutoff_len", "77")
    assert (args.lora.lora_r, args.training.model_max_length) == (32, 77)
    # alpha follows the rank of LLaMA-Factory's key
    assert args.lora.lora_alpha == 8
    assert parse({**BASE, "lora_rank": 4}, "--lora_rank", "5").lora.lora_alpha == 10
    with pytest.raises(ArgumentError, match=r"lora_rank says lora_r 4, .*lora_r says 5: remove one of them"):
        parse({**BASE, "lora_rank": 4, "lora_r": 5})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"finetuning_type": "full"},
            {"use_lora": False, "tune_llm": True, "tune_vision": False, "tune_resampler": False},
        ),
        (
            {"finetuning_type": "full", "freeze_vision_tower": False, "freeze_multi_modal_projector": False},
            {"tune_llm": True, "tune_vision": True, "tune_resampler": True, "vision_lr": 5e-5, "resampler_lr": 5e-5},
        ),
        (
            {"finetuning_type": "full", "freeze_language_model": True, "freeze_multi_modal_projector": False},
            {"tune_llm": False, "tune_vision": False, "tune_resampler": True},
        ),
        ({"finetuning_type": "lora", "freeze_vision_tower": False}, {"lora_parts": ["llm", "vision"]}),
        ({"freeze_multi_modal_projector": False}, {"use_lora": True, "tune_resampler": True, "resampler_lr": 5e-5}),
        ({"finetuning_type": "freeze"}, {"use_lora": False, "tune_llm": True, "tune_llm_layers": 2}),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": -3}, {"tune_llm_layers": -3}),
        ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"disable_shuffling": True}, {"train_sampling_strategy": "sequential"}),
    ],
)
def test_what_is_trained(parse, given, expected):
    training = parse({**BASE, **given}).training
    assert {name: getattr(training, name) for name in expected} == expected


def test_the_method_of_the_file_can_be_replaced(parse):
    training = parse({**BASE, "finetuning_type": "full"}, "--finetuning_type", "lora").training
    assert training.use_lora
    assert not training.tune_llm


@pytest.mark.parametrize(
    ("given", "group", "expected"),
    [
        ({"lora_target": "q_proj,v_proj"}, "lora", {"lora_target_modules": "q_proj,v_proj"}),
        ({"lora_target": ["q_proj", "v_proj"]}, "lora", {"lora_target_modules": "q_proj,v_proj"}),
        ({"additional_target": "resampler"}, "lora", {"lora_modules_to_save": "resampler"}),
        ({"adapter_name_or_path": "a/b"}, "lora", {"lora_weight_path": "a/b"}),
        ({"use_dora": True, "use_rslora": True}, "lora", {"use_dora": True, "use_rslora": True}),
        ({"quantization_bit": 4}, "lora", {"q_lora": True}),
        ({"mask_history": True}, "data", {"train_on": "last"}),
        ({"dataset": ["a", "b"], "val_size": 0.1}, "data", {"dataset": "a,b", "val_size": 0.1}),
        ({"flash_attn": "sdpa"}, "model", {"attn_implementation": "sdpa"}),
        ({"flash_attn": "disabled"}, "model", {"attn_implementation": "eager"}),
        ({"flash_attn": "auto"}, "model", {"attn_implementation": None}),
        ({"template": "minicpm_v", "print_param_status": True}, "model", {"print_param_status": True}),
        ({"evaluation_strategy": "no", "warmup_ratio": 0.1}, "training", {"warmup_steps": 0.1}),
        ({"packing": True}, "training", {"packing": "best_fit"}),
        ({"packing": False}, "training", {"packing": "off"}),
        ({"neat_packing": True}, "training", {"packing": "best_fit"}),
        ({"packing": "batch", "packing_tokens": 4096}, "training", {"packing": "batch", "packing_tokens": 4096}),
    ],
)
def test_keys(parse, given, group, expected):
    found = getattr(parse({**BASE, **given}), group)
    assert {name: getattr(found, name) for name in expected} == expected


def test_their_preference_keys_are_ours(parse):
    """As in LLaMA-Factory's examples; keys with their defaults have no effect elsewhere and are not refused there."""
    given = {**BASE, "stage": "dpo", "pref_beta": 0.2, "pref_loss": "ipo", "pref_ftx": 0.1}
    args = parse(given)
    assert args.data.stage == "dpo"
    assert options_of(args.training) == PreferenceOptions(loss="ipo", beta=0.2, ftx=0.1)
    assert options_of(parse({**BASE, "stage": "dpo"}).training) == PreferenceOptions()
    everything = {"pref_beta": 0.1, "pref_loss": "sigmoid", "pref_ftx": 0.0, "dpo_label_smoothing": 0.0}
    assert parse({**BASE, **everything, "simpo_gamma": 0.5}).data.stage == "sft"
    own = parse_arguments(["--model_name_or_path", "m", "--data_path", "d", "--stage", "dpo", "--pref_loss", "simpo"])
    assert options_of(own.training).gamma == 0.5


def test_a_file_of_ours_with_a_stage_keeps_our_defaults(parse):
    ours = {"model_name_or_path": "m", "stage": "dpo", "data_path": "d", "use_lora": True}
    assert parse(ours).lora.lora_r == 64
    assert parse({**BASE, "stage": "dpo"}).lora.lora_r == 8


def test_what_the_machine_lacks_falls_back_with_one_warning(parse, caplog, monkeypatch):
    monkeypatch.setattr("finetune.arguments.training.is_torch_cuda_available", lambda: False)
    args = parse({**BASE, "flash_attn": "fa2", "deepspeed": "examples/deepspeed/ds_z3_config.json"})
    assert args.model.attn_implementation == "sdpa"
    assert isinstance(args.training.deepspeed, dict)
    assert args.training.deepspeed["zero_optimization"]["stage"] == 3
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("sdpa is used instead" in line for line in warnings) == 1
    assert sum("the equivalent ds_config_zero3.json is used" in line for line in warnings) == 1
    assert parse({**BASE, "deepspeed": "ds_z0_config.json"}).training.deepspeed is None
    with pytest.raises(ArgumentError, match="ds_z9_config.json: no such file"):
        parse({**BASE, "deepspeed": "ds_z9_config.json"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_rnak": 8}, r"x\.yaml: unknown: lora_rnak \(did you mean lora_rank\?\)"),
        ({"stage": "kto"}, "stage kto is not part of this tool: sft"),
        ({"pref_beta": 0.2}, "pref_beta 0.2 belongs to preference training"),
        ({"stage": "dpo", "simpo_gamma": 1.0}, "simpo_gamma 1.0 has an effect with --pref_loss simpo only"),
        ({"stage": "dpo", "pref_loss": "orpo", "dpo_label_smoothing": 0.1}, "dpo_label_smoothing 0.1 has an effect"),
        ({"stage": "dpo", "dpo_label_smoothing": 0.5}, "below 0.5; half of the labels wrong"),
        ({"stage": "dpo", "pref_reference": "adapter_off", "finetuning_type": "full"}, "adapter_off needs adapters"),
        (
            {"stage": "dpo", "pref_reference": "adapter_off", "use_lora": True, "lora_bias": "all"},
            "biases of the base itself train",
        ),
        ({"stage": "dpo", "pref_reference": "adapter_off", "adapter_name_or_path": "a"}, "not be the model that"),
        ({"stage": "dpo", "pref_reference": "cached", "pref_loss": "simpo"}, "--pref_loss simpo needs no reference"),
        ({"stage": "dpo", "streaming": True, "max_steps": 1}, "--streaming true with --stage dpo"),
        ({"stage": "dpo", "ref_model": "m"}, "its reference is the model that training starts from"),
        ({"finetuning_type": "oft"}, "finetuning_type oft is not part of this tool: lora, full and freeze are"),
        ({"quantization_bit": 8}, "8 is not part of this tool: 4 bit is"),
        ({"train_on_prompt": True}, "only answers are trained"),
        ({"mix_strategy": "interleave_under"}, "a:0.3,b:2"),
        ({"adapter_name_or_path": "a,b"}, "several adapters: merge the first"),
        ({"flash_attn": "fa3"}, "auto, disabled, sdpa, fa2 are"),
        ({"freeze_language_model": True}, "no part is left for adapters"),
        ({"do_predict": True}, "finetune evaluate"),
        ({"do_train": False}, "do_train false: this command trains"),
        ({"use_liger_kernel": True}, "saved here without it"),
        ({"packing": "tight"}, "--packing tight: off, batch or best_fit"),
        ({"packing": True, "disable_shuffling": True}, "packed rows are ordered and balanced"),
        ({"packing": True, "packing_items": 0}, r"packing_items 0 \(.*\): it must be at least 1"),
        (
            {"streaming": True, "max_steps": 1, "train_sampling_strategy": "group_by_length"},
            "need the lengths of all samples",
        ),
        ({"mask_history": "maybe"}, "it must be true or false"),
        ({"data_path": "x"}, "are both given"),
    ],
)
def test_what_is_refused(parse, given, message):
    with pytest.raises(ArgumentError, match=message):
        parse({**BASE, **given})


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "each line should be a flag"), ("a: [1\n", "not a YAML file"), ("3: 4\n", "each line should be")],
)
def test_files_that_are_none(parse, text, message):
    with pytest.raises(ArgumentError, match=message):
        parse(text)
    with pytest.raises(ArgumentError, match="no such file"):
        parse_arguments(["absent.yaml"])


def test_export_keys_in_a_training_file_are_named(parse, caplog):
    parse({**BASE, "export_dir": "x", "temperature": 0.5})
    assert "export_dir has no effect in training" in caplog.text
    assert "temperature 0.5 has no effect: for generation" in caplog.text


def test_run_yaml_runs_again(parse, tmp_path):
    """With its origins in comments, and what the machine decided left to the next machine."""
    kwargs = {"use_reentrant": False}
    given = {**BASE, "lora_target": "q_proj", "gradient_checkpointing_kwargs": kwargs, "deepspeed": "ds_z2_config.json"}
    first = parse(given, "--max_steps", "3", "--lora_parts", "llm", "vision")
    written = tmp_path / "run.yaml"
    written.write_text(first.to_yaml() + "versions: {torch: 1}\nbase: {name: m}\n")
    again = parse_arguments([str(written)])
    assert again.non_defaults() == first.non_defaults()
    flags = yaml.safe_load(written.read_text())["flags"]
    assert flags["gradient_checkpointing_kwargs"] == kwargs
    assert "use_cpu" not in flags
    assert "  max_steps: 3  # command line\n" in written.read_text()
    assert "  lora_r: 8  # LLaMA-Factory's default of lora_rank\n" in written.read_text()
    assert parse_arguments([str(written), "--max_steps", "9"]).training.max_steps == 9


def test_their_names_work_beside_the_launchers_flags(caplog):
    """Without a file of theirs our defaults stay."""
    words = ["--model_name_or_path", "m", "--data_path", "d", "--use_lora", "true", "--lora_rank", "4"]
    args = parse_arguments([*words, "--freeze_multi_modal_projector", "true", "--cutoff_len", "9"])
    assert (args.lora.lora_r, args.lora.lora_alpha, args.training.model_max_length) == (4, 64, 9)
    assert not args.training.tune_resampler
    with pytest.raises(ArgumentError, match=r"--lora_rnk \(did you mean"):
        parse_arguments([*words, "--lora_rnk", "4"])


def test_flags_that_stand_alone(tmp_path):
    words = ["--model_name_or_path", "m", "--data_path", "d", "--tune_audio", "--no_dataloader_pin_memory"]
    args = parse_arguments([*words, "--no_average_tokens_across_devices", "--use_dora"])
    assert args.training.tune_audio
    assert args.lora.use_dora
    assert not args.training.average_tokens_across_devices
    written = tmp_path / "run.yaml"
    written.write_text(args.to_yaml() + "versions: {}\n")
    assert not parse_arguments([str(written)]).training.average_tokens_across_devices


def test_json_files_are_files_too(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(BASE))
    assert parse_arguments([str(path)]).lora.lora_r == 8
