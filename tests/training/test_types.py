"""Mixed dtypes: a training step works for every combination of trained and frozen parts in fp32 and 16 bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.families import usable
from finetune.families.family import Family
from finetune.models import load_model, load_tokenizer
from finetune.sample import Media, Message, Sample, Source, Text
from finetune.training.freezing import adapt

pytestmark = pytest.mark.usefixtures("one_thread")


def combinations(family: Family) -> Iterator[dict[str, str]]:
    """Every way to train a family: each part frozen, in full or with adapters.

    The o models share one network; of the older one, audio is handled like images.
    """
    for modes in product(("frozen", "full", "lora"), repeat=len(family.parts)):
        chosen: dict[str, str] = dict(zip(family.parts, modes, strict=True))
        if family.name == "o2_6" and chosen["audio"] != chosen["vision"]:
            continue
        if set(modes) != {"frozen"} and not (chosen["llm"] == "full" and "lora" in modes):
            yield chosen


def arguments(chosen: dict[str, str], output: Path, *, bf16: bool) -> TrainingArguments:
    adapted = [part for part, mode in chosen.items() if mode == "lora"]
    flags: dict[str, Any] = {f"tune_{part}": mode == "full" for part, mode in chosen.items()}
    if adapted:
        flags |= {"use_lora": True, "lora_parts": adapted}
    return TrainingArguments(output_dir=str(output), use_cpu=True, bf16=bf16, **flags)


def batch_of(folder: Path, family: Family) -> dict[str, torch.Tensor]:
    """A row of text and an image, with audio for models that take it."""
    encoder = Encoder(family, load_tokenizer(folder), resolve_base(str(folder)).settings, max_slice_nums=1)
    noise = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    parts = [Media("image", Image.fromarray(noise)), Text("What?")]
    if family.audio_spec is not None:
        parts.append(Media("audio", np.sin(np.arange(3200, dtype=np.float32) / 20)))
    turns = (Message("user", tuple(parts)), Message("assistant", (Text("That."),), train=True))
    return pad([encoder.encode(Sample(id="s", source=Source("data", 0), messages=turns))], encoder.pad_id)


def fault_of_a_step(model: nn.Module, batch: dict[str, torch.Tensor], *, bf16: bool) -> str | None:
    """What is wrong with a forward and a backward pass as the Trainer makes them without DeepSpeed."""
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
    except RuntimeError as error:
        return str(error)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if set(found) != trained:
        return f"gradients differ from what trains: {sorted(set(found) ^ trained)[:3]}"
    finite = loss.isfinite() and all(gradient.isfinite().all() for gradient in found.values())
    return None if finite else "not finite"


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", usable(), ids=lambda family: family.name)
def test_every_combination_of_trained_and_frozen_parts_makes_a_step(tiny, tmp_path, family, bf16):
    folder = tiny(family.name)
    base = load_model(folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    batch, faults = batch_of(folder, family), {}
    for chosen in combinations(family):
        training = arguments(chosen, tmp_path, bf16=bf16)
        model = adapt(copy.deepcopy(base), family, training, LoraArguments(lora_r=2)).train()
        if fault := fault_of_a_step(model, batch, bf16=bf16):
            faults["-".join(chosen.values())] = fault
    assert not faults


@pytest.mark.parametrize("family", [f for f in usable() if f.name in ("v2_0", "o4_5", "v4_6")], ids=lambda f: f.name)
def test_biases_that_train_beside_frozen_weights(tiny, tmp_path, family):
    """--lora_bias all trains half of every norm."""
    folder = tiny(family.name)
    training = arguments(dict.fromkeys(family.parts, "lora"), tmp_path, bf16=True)
    model = adapt(load_model(folder, dtype=torch.bfloat16), family, training, LoraArguments(lora_r=2, lora_bias="all"))
    assert fault_of_a_step(model.train(), batch_of(folder, family), bf16=True) is None
