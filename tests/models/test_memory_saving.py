"""Gradient checkpointing per part, vision_batch and frozen towers do not change results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sound_batch import sound_batch
from test_checkpointing import ROWS, assert_equal, layers_on, loss_and_gradients
from visual_batch import make_batch, small_model

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.families import by_name
from finetune.models import MiniCPMO, MiniCPMV
from finetune.models.memory_saving import chunk_counts
from finetune.training.freezing import adapt
from finetune.utils.errors import ArgumentError

MODULES = {"vision": "vpm", "audio": "apm", "llm": "llm"}


def arguments(tmp_path: Path, **flags: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags)


@contextmanager
def counted_calls(module: torch.nn.Module) -> Iterator[list[int]]:
    """Patches, or clips, of every call of a tower."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    yield calls
    handle.remove()


@pytest.mark.parametrize(
    ("groups", "most", "expected"),
    [
        ([1, 1, 1, 1, 1], 2, [2, 2, 1]),
        ([1, 1], 8, [2]),
        ([1, 1, 1], None, [3]),
        ([3, 1, 1, 4, 1], 2, [1, 2, 1, 1]),
        ([], 2, [0]),
    ],
)
def test_pieces(groups: list[int], most: int | None, expected: list[int]) -> None:
    """Groups stay together, also those that are larger than a piece."""
    assert chunk_counts(groups, most) == expected


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["v2_0", "v4_5"])
def test_images_in_pieces(family: str, again: bool) -> None:
    model = small_model(family).train()
    batch = make_batch(ROWS, model.query_num)
    plain = loss_and_gradients(model, batch)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for most, expected in ((1, [24, 9, 10]), (2, [33, 10]), (3, [43])):
        model.vision_batch = most
        with counted_calls(model.vpm) as calls:
            loss, grads = loss_and_gradients(model, batch)
        assert calls[: len(expected)] == expected
        assert loss == pytest.approx(plain[0], abs=1e-6)
        for name, grad in grads.items():
            assert torch.allclose(grad, plain[1][name], atol=1e-6, rtol=1e-4), name


def test_sound_in_pieces() -> None:
    model = small_model("o2_6").train()
    assert isinstance(model, MiniCPMO)
    batch = sound_batch(model, [((40, [], 4), [40, 90]), ((50, [(4, 6)], 5), [61])])
    plain = loss_and_gradients(model, batch)
    model.vision_batch = 2
    with counted_calls(model.apm) as calls:
        loss, grads = loss_and_gradients(model, batch)
    assert calls == [2, 1]
    assert loss == pytest.approx(plain[0], abs=1e-6)
    for name, grad in grads.items():
        assert torch.allclose(grad, plain[1][name], atol=1e-6, rtol=1e-4), name


def test_packed_frames_stay_together() -> None:
    model = small_model("v4_5").train()
    batch = make_batch([(3, [(4, 6)], 5), (2, [(3, 3), (3, 3)], 6)], model.query_num)
    batch["image_bound"] = batch["image_bound"][:2]
    batch["group_sizes"], batch["temporal_ids"] = torch.tensor([1, 2]), torch.tensor([-1, 0, 3])
    plain = loss_and_gradients(model, batch)
    model.vision_batch = 1
    with counted_calls(model.vpm) as calls:
        loss, _ = loss_and_gradients(model, batch)
    assert calls == [24, 18]
    assert loss == pytest.approx(plain[0], abs=1e-6)


def test_text_alone_still_calls_the_tower_once() -> None:
    model = small_model("v2_6").train()
    model.vision_batch = 2
    with counted_calls(model.vpm) as calls:
        _, grads = loss_and_gradients(model, make_batch([(5, [], 4)], model.query_num))
    assert calls == [4]
    assert set(grads) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("parts", [["llm"], ["vision"], ["llm", "vision"], ["audio", "llm"]])
def test_parts_run_again(tmp_path: Path, parts: list[str]) -> None:
    """Loss and gradients are equal whichever parts are recomputed."""
    model = small_model("o2_6").train()
    batch = make_batch(ROWS, model.query_num)
    plain = loss_and_gradients(model, batch)
    training = arguments(tmp_path, checkpoint_parts=parts, gradient_checkpointing=True, tune_audio=True)
    adapted: Any = adapt(model, by_name("o2_6"), training, LoraArguments())
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    assert layers_on(model) == {MODULES[part] for part in parts}
    loss, grads = loss_and_gradients(model, batch)
    assert_equal((plain[0], {name: plain[1][name] for name in grads}), (loss, grads))


def test_parts_run_again_under_adapters(tmp_path: Path) -> None:
    training = arguments(tmp_path, use_lora=True, checkpoint_parts=["llm"], gradient_checkpointing=True)
    model: Any = adapt(small_model("v4_5"), by_name("v4_5"), training, LoraArguments(lora_r=4)).train()
    model.gradient_checkpointing_enable()
    assert layers_on(model.get_base_model()) == {"llm"}


@pytest.mark.parametrize("flags", [{"tune_vision": False}, {"use_lora": True}], ids=["full", "LoRA"])
@pytest.mark.parametrize("family", ["v2_0", "v4_5", "o4_5"])
def test_frozen_towers_keep_nothing(tmp_path: Path, family: str, flags: dict[str, bool]) -> None:
    """No tensor is saved for a backward pass while a frozen tower runs, whatever asks its inputs for gradients."""
    training = arguments(tmp_path, **flags)
    model: Any = adapt(small_model(family), by_name(family), training, LoraArguments(lora_r=4)).train()
    model.enable_input_require_grads()
    inner: MiniCPMV = model.get_base_model() if training.use_lora else model
    inside: list[str] = []
    kept: list[str] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.extend(inside)
        return tensor

    towers = [inner.vpm, *([inner.apm] if hasattr(inner, "apm") else [])]
    for tower in towers:
        tower.register_forward_pre_hook(lambda *_: inside.append("tower"))
        tower.register_forward_hook(lambda *_: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**make_batch(ROWS, inner.query_num)).loss.backward()
    assert kept == []
    towers[0].requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**make_batch(ROWS, inner.query_num))
    assert kept, "the hook would see it"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"checkpoint_parts": ["audio"]}, "has no audio part"),
        ({"vision_batch": 0}, "at least 1 visual item"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, flags: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArgumentError, match=problem):
        adapt(small_model("v4_5"), by_name("v4_5"), arguments(tmp_path, **flags), LoraArguments())
