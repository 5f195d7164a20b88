"""--checkpoint_parts fit: as few recomputed layers as the memory of the GPU allows."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_network import SMALL

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.models import load_tokenizer
from finetune.planning import recompute_choice
from finetune.planning.memory_estimate import MemoryEstimator
from finetune.planning.training_setup import SampleShape, TrainingSetup
from finetune.readers.mixture import open_data
from finetune.utils.errors import ArgumentError

SHAPE = SampleShape(batch=4, tokens=512, items=2, patches=256)
Data = tuple[dict[str, Any], LengthPolicy, Any]


def arguments(folder: Path, **flags: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **flags)


@pytest.fixture
def data(tiny: Callable[[str], Path], tmp_path: Path) -> Data:
    """config.json, the length_policy and three records: a long text, a picture, and one that cannot be used."""
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    turns = [("What?", " ".join(["word"] * 80), None), ("<image>\nWhat?", "a car", "a.png"), ("<image>", "x", "no.png")]
    records = []
    for number, (question, answer, image) in enumerate(turns):
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append({"id": str(number), "conversations": said} | ({"image": image} if image else {}))
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    base = resolve_base(str(tiny("v2_6")))
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings, max_length=2048)
    return base.settings, LengthPolicy(encoder, "error"), open_data(tmp_path / "data.json", None)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_fewest_layers_that_fit(method: Any, tmp_path: Path) -> None:
    """The same memory as a plan of the same training, and the first choice that is within the limit."""
    training = arguments(tmp_path, use_lora=method == "lora", tune_vision=True)
    planner, recipe = MemoryEstimator(SMALL, torch.float32), TrainingSetup(method=method, tune_vision=True)
    planned = {
        parts: planner.memory(TrainingSetup(method=method, tune_vision=True, checkpoint_parts=parts), SHAPE).total
        for parts in ((), ("vision",), ("llm",), None)
    }
    assert recipe.vision
    assert planned[None] < planned[("llm",)] < planned[("vision",)] < planned[()]
    for parts, total in planned.items():
        found, memory = recompute_choice.fitting_parts(SMALL, training, LoraArguments(), SHAPE, total)
        assert (found if found is None else tuple(found)) == parts
        assert memory.total == total
    assert recompute_choice.fitting_parts(SMALL, training, LoraArguments(), SHAPE, 1000)[0] is None
    assert training.checkpoint_parts is None, "the flags of the run stay as they are"


def test_the_micro_batch_is_the_largest_of_the_data(data: Data, tmp_path: Path) -> None:
    _, length_policy, samples = data
    long, seen = (length_policy.encoder.measure(samples[index]) for index in (0, 1))
    found = recompute_choice.step_shape(arguments(tmp_path, per_device_train_batch_size=3), length_policy, samples)
    assert (found.batch, found.tokens, found.items) == (3, max(long.tokens, seen.tokens), seen.items)
    assert found.items * found.patches >= seen.patches
    packed = recompute_choice.step_shape(
        arguments(tmp_path, packing="best_fit", packing_tokens=4096), length_policy, samples
    )
    assert (packed.batch, packed.tokens) == (1, 4096)
    assert packed.items >= seen.items * 4096 // found.tokens
    capped = recompute_choice.step_shape(
        arguments(tmp_path, packing="best_fit", packing_tokens=4096, packing_items=seen.items), length_policy, samples
    )
    assert capped.items == seen.items
    streamed = recompute_choice.step_shape(
        arguments(tmp_path, model_max_length=3000), length_policy, samples, streaming=True
    )
    assert (streamed.tokens, streamed.items) == (3000, seen.items), "a longer one may come"
    with pytest.raises(ArgumentError, match="none of the records"):
        recompute_choice.step_shape(arguments(tmp_path), length_policy, [])


def test_what_a_run_is_told(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, length_policy, samples = data
    caplog.set_level(logging.INFO, "finetune.planning.recompute_choice")

    def settled(memory: int | None) -> tuple[bool | None, list[str] | None, str]:
        caplog.clear()
        monkeypatch.setattr(recompute_choice, "_gpu_memory", lambda _: memory)
        training = arguments(tmp_path, checkpoint_parts=["fit"])
        recompute_choice.choose_parts(
            config, training, LoraArguments(), lambda: recompute_choice.step_shape(training, length_policy, samples)
        )
        names = ("gradient_checkpointing", "activation_checkpointing")  # the Trainer looks at the newer where it is
        (on,) = {getattr(training, name) for name in names if hasattr(training, name)}
        return on, training.checkpoint_parts, caplog.text

    assert settled(None)[:2] == (True, None), "nothing is known of a CPU"
    roomy = settled(80 << 30)
    assert roomy[:2] == (False, None)
    assert "no layers are recomputed" in roomy[2]
    assert "of 80.0 GB estimated for 1 x" in roomy[2]
    tight = settled(1 << 20)
    assert tight[:2] == (True, None)
    assert "all layers are recomputed" in tight[2]
    assert "python -m finetune plan lists setups that fit" in tight[2]


def test_what_is_not_asked_for_stays(tmp_path: Path) -> None:
    training = arguments(tmp_path, checkpoint_parts=["llm"], gradient_checkpointing=True)
    recompute_choice.choose_parts(SMALL, training, LoraArguments(), lambda: SHAPE)
    assert training.checkpoint_parts == ["llm"]
    with pytest.raises(ArgumentError, match="fit chooses the parts itself"):
        arguments(tmp_path, checkpoint_parts=["fit", "llm"])
