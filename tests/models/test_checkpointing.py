"""Gradient checkpointing changes memory, not numbers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.modeling_layers import GradientCheckpointingLayer
from visual_batch import Row, gradients, make_batch

from finetune.models import MiniCPMO, MiniCPMV, memory_saving

ROWS: list[Row] = [(3, [(4, 6)], 5), (6, [], 4), (2, [(3, 3), (5, 2)], 6)]


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), gradients(model)


def assert_equal(left: tuple[float, dict], right: tuple[float, dict]) -> None:
    assert left[0] == right[0]
    assert set(left[1]) == set(right[1])
    for name, grad in left[1].items():
        assert torch.allclose(grad, right[1][name], atol=1e-7, rtol=1e-5), name


def layers_on(model: torch.nn.Module) -> set[str]:
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer))
    return {name.split(".")[0] for name, module in layers if module.gradient_checkpointing}


@pytest.mark.parametrize("reentrant", [False, True])
def test_full(model: MiniCPMV, reentrant: bool) -> None:
    batch = make_batch(ROWS, model.query_num)
    model.train()
    plain = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert layers_on(model) == {"llm", "vpm", *(["apm"] if isinstance(model, MiniCPMO) else [])}
    assert_equal(plain, loss_and_gradients(model, batch))


@pytest.mark.parametrize("part", ["vpm", "llm"])
def test_one_part_alone(model: MiniCPMV, part: str) -> None:
    batch = make_batch(ROWS, model.query_num)
    model.train()
    plain = loss_and_gradients(model, batch)
    getattr(model, part).gradient_checkpointing_enable({"use_reentrant": False})
    assert layers_on(model) == {part}
    assert_equal(plain, loss_and_gradients(model, batch))
    getattr(model, part).gradient_checkpointing_disable()
    assert layers_on(model) == set()


def test_layers_are_really_run_again(model: MiniCPMV) -> None:
    counts = []
    for module in model.vpm.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda *_: counts.append(1))
    batch = make_batch(ROWS, model.query_num)
    model.train()
    loss_and_gradients(model, batch)
    once = len(counts)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_and_gradients(model, batch)
    assert len(counts) - once > once


@pytest.mark.parametrize("frozen", [False, True], ids=["tower trained", "tower frozen"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_resampler_is_run_again_in_chunks(
    model: MiniCPMV, monkeypatch: pytest.MonkeyPatch, reentrant: bool, frozen: bool
) -> None:
    """Items of 24, 9 and 10 patches: the last two are one chunk."""
    monkeypatch.setattr(memory_saving, "RESAMPLED_PATCHES", 19)
    model.vpm.requires_grad_(not frozen)
    batch = make_batch(ROWS, model.query_num)
    model.train()
    plain = loss_and_gradients(model, batch)
    calls: list[int] = []
    model.resampler.ln_post.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, grads = loss_and_gradients(model, batch)
    assert sorted(calls) == [1, 1, 2, 2]
    assert loss == pytest.approx(plain[0], abs=1e-6)
    assert set(grads) == set(plain[1])
    for name, grad in grads.items():
        assert torch.allclose(grad, plain[1][name], atol=1e-6, rtol=1e-4), name
    calls.clear()
    model.eval()
    loss_and_gradients(model, batch)
    model.train()
    model.gradient_checkpointing_disable()
    assert_equal(plain, loss_and_gradients(model, batch))
    assert calls == [3, 3]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:`is_gradient_checkpointing`")
def test_lora_with_input_gradients(model: MiniCPMV, vision: bool, reentrant: bool) -> None:
    """Adapters below a frozen embedding table; the merge must leave the hooked leaf alone."""
    targets = r"llm\..*layers\.\d+\.self_attn\.(q_proj|v_proj)"
    if vision:
        targets += r"|vpm\..*\.(fc1|fc2)"
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=["resampler"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).train()
    batch = make_batch(ROWS, model.query_num)
    plain = loss_and_gradients(adapted, batch)
    adapted.enable_input_require_grads()
    assert_equal(plain, loss_and_gradients(adapted, batch))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(plain, loss_and_gradients(adapted, batch))
    named = [name for name in plain[1] if "lora_" in name]
    assert any(".llm." in name for name in named)
    assert any(".vpm." in name for name in named) == vision
    assert all(plain[1][name].abs().sum() > 0 for name in named)
