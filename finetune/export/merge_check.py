"""Proof that a merged model is the adapted one: both answer the same prompts, one after the other in memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import nn

from finetune.checkpoints.base_checkpoint import Checkpoint
from finetune.checkpoints.logit_tolerance import FLOAT32, computing_noise
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.models.adapters import put_adapter
from finetune.sample import Media, Message, Sample, Source, Text

Batch = dict[str, torch.Tensor]

_QUESTION = "What does the picture show, and what is written in it?"
_SIDE = 448


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two models are apart on a text and on an image prompt.

    Attributes:
        difference: largest absolute difference of logits.
        relative: the same over the largest magnitude.
        tolerance: largest relative difference allowed, twice what one more rounding in every layer does: both models'
            logits are no more certain than that.
        effect: largest absolute difference that the adapter makes; None without one.
    """

    difference: float
    relative: float
    tolerance: float
    effect: float | None

    @property
    def ok(self) -> bool:
        """Whether they are the same model."""
        return self.relative <= self.tolerance


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model answers.

    Attributes:
        logits: of every prompt, in float32.
        plain: the same with the adapter off; None without one.
        noise: how far one more rounding in every layer moves the logits; 0 in float32.
    """

    logits: list[torch.Tensor]
    plain: list[torch.Tensor] | None
    noise: float


def make_prompts(base: Checkpoint) -> list[Batch]:
    """A question alone, and the same about a picture of noise, whose every patch is different."""
    encoder = Encoder.from_config(base.family, load_tokenizer(base.folder), base.settings, max_slice_nums=1)
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    prompts = []
    for parts in ((Text(_QUESTION),), (Media("image", Image.fromarray(noise)), Text(f"\n{_QUESTION}"))):
        sample = Sample(id="export", source=Source("export", 0), messages=(Message("user", parts),))
        prompts.append(pad([encoder.encode(sample, generate=True)], encoder.pad_id))
    return prompts


def answers_of(
    base: Checkpoint, adapters: Sequence[Path], prompts: Sequence[Batch], *, dtype: torch.dtype | str, device: str
) -> Answers:
    """Loads a model, puts adapters on it and asks it; the last adapter stays one, peft merges those before it.

    Args:
        base: the model.
        adapters: in the order in which they apply.
        prompts: of ``make_prompts``.
        dtype: to load in; "auto" is the file's.
        device: to compute on.
    """
    options = {"dtype": dtype, "device_map": {"": device}, "downsample_mode": base.downsample_mode}
    network: Any = load_model(base.folder, **options)
    for number, adapter in enumerate(adapters, 1):
        network = put_adapter(network, adapter)
        if number < len(adapters):
            network = network.merge_and_unload()
    network.eval()
    batches = [{name: value.to(device) for name, value in batch.items() if name != "labels"} for batch in prompts]
    logits, plain = _logits(network, batches), None
    noise = max(
        computing_noise(network, partial(_ask, network, batch), before)
        for batch, before in zip(batches, logits, strict=True)
    )
    if isinstance(network, PeftModel):
        with network.disable_adapter():
            plain = _logits(network, batches)
    del network
    gc.collect()
    return Answers(logits, plain, noise)


def compare(adapted: Answers, merged: Answers) -> Agreement:
    """How far a merged model is from the adapted one."""
    largest = max(*(logits.abs().max().item() for logits in adapted.logits), 1e-6)
    difference = _distance(adapted.logits, merged.logits)
    effect = None if adapted.plain is None else _distance(adapted.logits, adapted.plain)
    return Agreement(difference, difference / largest, max(2 * adapted.noise / largest, FLOAT32), effect)


def _distance(ours: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(ours, others, strict=True))


def _logits(network: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    return [_ask(network, batch) for batch in batches]


def _ask(network: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return network(**batch).logits.float().cpu()
