"""Every lora_* flag reaches peft; training of a saved adapter is continued; QLoRA quantises the LLM only."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import PeftModel

from finetune.arguments.model import LoraArguments
from finetune.arguments.parse import parse_arguments
from finetune.families import by_name
from finetune.models import load_model
from finetune.training.freezing import part_rows
from finetune.training.lora import add_lora, lora_config, quantisation
from finetune.utils.errors import ArgumentError

FAMILY = by_name("llama3_v2_5")


def adapters(model: torch.nn.Module) -> set[str]:
    """Names of the modules that have an adapter."""
    return {
        name.split(".lora_A")[0].removeprefix("base_model.model.")
        for name, _ in model.named_parameters()
        if ".lora_A" in name
    }


def test_every_flag_reaches_peft(tiny):
    model = load_model(tiny("llama3_v2_5"))
    flags = "--lora_r 4 --lora_alpha 6 --lora_dropout 0.1 --lora_bias all --use_rslora true --use_dora true"
    words = ["--model_name_or_path", "m", "--data_path", "d", "--use_lora", "true", *flags.split()]
    lora = parse_arguments(
        [
            *words,
            "--lora_target_modules",
            r"llm\..*(up_proj|down_proj)",
            "--lora_layers_to_transform",
            "1",
            "--lora_layers_pattern",
            "layers",
            "--lora_layer_replication",
            "[[0, 1], [0, 2]]",
            "--lora_modules_to_save",
            "embed_tokens, lm_head",
        ]
    ).lora
    config = lora_config(model, FAMILY, ["resampler"], lora)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 6, 0.1, "all")
    assert config.use_rslora
    assert config.use_dora
    assert config.layers_to_transform == [1]
    assert config.layers_pattern == "layers"
    assert config.layer_replication == [(0, 1), (0, 2)]
    assert config.modules_to_save == ["resampler", "embed_tokens", "lm_head"]
    assert config.task_type is None


def test_layers_to_transform_leaves_the_vision_tower_alone(tiny):
    model = add_lora(load_model(tiny("llama3_v2_5")), FAMILY, [], LoraArguments(lora_layers_to_transform=[1]))
    assert adapters(model) == {f"llm.model.layers.1.self_attn.{name}_proj" for name in "qkvo"}


@pytest.mark.parametrize("flags", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": "lora_only"}])
def test_variants_train(tiny, flags):
    model = add_lora(
        load_model(tiny("llama3_v2_5"), dtype=torch.float32), FAMILY, ["resampler"], LoraArguments(**flags)
    )
    ids = torch.arange(10, 30)[None]
    model.train()
    model(input_ids=ids, labels=ids.clone()).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".lora_B" in n)


def test_replication_that_cannot_be_done_or_read_is_refused(tiny):
    with pytest.raises(ArgumentError, match="pairs of layer numbers"):
        add_lora(load_model(tiny("v2_0")), by_name("v2_0"), [], LoraArguments(lora_layer_replication="0-3"))
    with pytest.raises(ArgumentError, match="peft does not support it"):
        add_lora(load_model(tiny("v2_0")), by_name("v2_0"), [], LoraArguments(lora_layer_replication="[[0, 2]]"))


@pytest.fixture
def former(tiny, tmp_path):
    """An adapter of rank 4 whose weights are not those of a fresh one."""
    model = add_lora(
        load_model(tiny("llama3_v2_5"), dtype=torch.float32), FAMILY, ["resampler"], LoraArguments(lora_r=4)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name or name.endswith("default.proj"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "former")
    return tmp_path / "former", model


def test_lora_weight_path_starts_from_that_adapter(tiny, former, caplog):
    folder, saved = former
    base = load_model(tiny("llama3_v2_5"), dtype=torch.float32)
    model = add_lora(base, FAMILY, ["resampler"], LoraArguments(lora_weight_path=str(folder), lora_alpha=64))
    assert "its r 4 is used, not 64 of the flags" in caplog.text
    weights = dict(saved.named_parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".lora_B" in name for name in trained)
    assert any("resampler.modules_to_save" in name for name in trained)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_lora_weight_path_that_does_not_fit_is_refused(tiny, former, tmp_path):
    folder, _ = former
    with pytest.raises(ArgumentError, match="saves resampler in full, the flags train resampler, vpm"):
        add_lora(
            load_model(tiny("llama3_v2_5")), FAMILY, ["resampler", "vpm"], LoraArguments(lora_weight_path=str(folder))
        )
    with pytest.raises(ArgumentError, match="no adapter there"):
        add_lora(load_model(tiny("llama3_v2_5")), FAMILY, [], LoraArguments(lora_weight_path=str(tmp_path)))


def test_q_lora_quantises_the_llm_alone_and_trains(tiny):
    pytest.importorskip("bitsandbytes")
    model = load_model(tiny("llama3_v2_5"), dtype=torch.float32, quantization_config=quantisation("float32"))
    packed = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(packed) == 2 * 7
    assert all(name.startswith("llm.model.layers.") for name in packed)
    full = sum(p.numel() for p in load_model(tiny("llama3_v2_5")).parameters())
    tuned = add_lora(model, FAMILY, ["resampler"], LoraArguments(lora_r=4))
    rates = {"llm": 1e-4, "vision": 1e-4, "resampler": 1e-4}
    added = sum(p.numel() for name, p in tuned.named_parameters() if ".lora_" in name)
    rows = part_rows(tuned, FAMILY.parts, rates)
    assert sum(row.total for row in rows) == full + added, "packed weights are counted by elements"
    assert {row.part: row.mode for row in rows} == {"vision": "frozen", "resampler": "full", "llm": "QLoRA r=4"}
    ids = torch.arange(10, 30)[None]
    tuned.train()
    tuned(input_ids=ids, labels=ids.clone()).loss.backward()
    assert isinstance(tuned, PeftModel)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in tuned.named_parameters() if ".lora_B" in n)


def test_q_lora_is_refused_where_it_cannot_work(monkeypatch):
    words = ["--model_name_or_path", "m", "--data_path", "d", "--q_lora", "true"]
    with pytest.raises(ArgumentError, match="needs --use_lora true"):
        parse_arguments(words)
    words += ["--use_lora", "true"]
    with pytest.raises(ArgumentError, match=r"ds_config_zero2\.json"):
        parse_arguments([*words, "--deepspeed", "ds_config_zero3.json"])
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(ArgumentError, match="pip install 'bitsandbytes"):
        parse_arguments(words)
