"""Verifies a merged model: compares its logits with those of base and adapter, loading one after the other."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers.utils import logging

from finetune.checkpoints.adapter_effect import no_effect
from finetune.checkpoints.base_checkpoint import BaseCheckpoint
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
    """How far the logits of two models differ on a text and an image prompt.

    Attributes:
        difference: largest absolute difference of logits.
        relative: the same divided by the largest absolute logit.
        tolerance: largest relative difference allowed: twice the effect of one more rounding in every layer, the
            rounding noise of both models.
        effect: largest absolute difference that the adapter makes; None without one.
        no_effect: why the adapter changes nothing; None if it does.
    """

    difference: float
    relative: float
    tolerance: float
    effect: float | None
    no_effect: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.relative <= self.tolerance


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Logits of a model on the prompts.

    Attributes:
        logits: of every prompt, in float32.
        base_logits: the same with the adapter disabled; None without one.
        noise: how far one more rounding in every layer changes the logits; 0 in float32.
        no_effect: why the last adapter changes nothing; None if it does.
    """

    logits: list[torch.Tensor]
    base_logits: list[torch.Tensor] | None
    noise: float
    no_effect: str | None = None

    @property
    def effect(self) -> float | None:
        """Largest absolute difference that the adapter makes; None without one."""
        return None if self.base_logits is None else _distance(self.logits, self.base_logits)


def make_prompts(base: BaseCheckpoint) -> list[Batch]:
    """A question without image, and the same with an image of noise, whose patches are all different."""
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings, max_slice_nums=1)
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    prompts = []
    for parts in ((Text(_QUESTION),), (Media("image", Image.fromarray(noise)), Text(f"\n{_QUESTION}"))):
        sample = Sample(id="export", source=Source("export", 0), messages=(Message("user", parts),))
        prompts.append(pad([encoder.encode(sample, generate=True)], encoder.pad_id))
    return prompts


def logits_of(
    base: BaseCheckpoint, adapters: Sequence[Path], prompts: Sequence[Batch], *, dtype: torch.dtype | str, device: str
) -> PromptLogits:
    """Loads a model with adapters and computes logits; peft merges all adapters but the last.

    Args:
        base: the model.
        adapters: in the order in which they apply.
        prompts: from ``make_prompts``.
        dtype: of the weights; "auto" uses that of the files.
        device: to compute on.
    """
    options = {"dtype": dtype, "device_map": {"": device}, "downsample_mode": base.downsample_mode}
    model: Any = load_model(base.folder, **options)
    for number, adapter in enumerate(adapters, 1):
        model = put_adapter(model, adapter)
        if number < len(adapters):
            model = model.merge_and_unload()
    model.eval()
    batches = [{name: value.to(device) for name, value in batch.items() if name != "labels"} for batch in prompts]
    logits, base_logits = _all_logits(model, batches), None
    noise = max(
        computing_noise(model, partial(_logits, model, batch), before)
        for batch, before in zip(batches, logits, strict=True)
    )
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            base_logits = _all_logits(model, batches)
    found = PromptLogits(logits, base_logits, noise)
    found = replace(found, no_effect=no_effect(model, found.effect))
    del model
    gc.collect()
    return found


@contextmanager
def one_bar() -> Iterator[None]:
    """Without progress bars of transformers: the bar of the first model was shown, the second is as large."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def compare(adapted: PromptLogits, merged: PromptLogits) -> Agreement:
    """How far a merged model is from the adapted one."""
    largest = max(*(logits.abs().max().item() for logits in adapted.logits), 1e-6)
    difference = _distance(adapted.logits, merged.logits)
    tolerance = max(2 * adapted.noise / largest, FLOAT32)
    return Agreement(difference, difference / largest, tolerance, adapted.effect, adapted.no_effect)


def _distance(ours: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(ours, others, strict=True))


def _all_logits(model: nn.Module, batches: Sequence[Batch]) -> list[torch.Tensor]:
    return [_logits(model, batch) for batch in batches]


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits.float().cpu()
