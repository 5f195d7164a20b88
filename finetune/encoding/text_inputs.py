"""Text tensors of an example: input_ids, labels, position_ids and placeholder bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from finetune.templates.prompt_types import TokenizedPrompt

if TYPE_CHECKING:
    import torch


class TextTensors(TypedDict):
    """Fields of ``Example`` that come from the prompt alone."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    image_bound: torch.Tensor
    audio_bound: torch.Tensor


def text_tensors(rendered: TokenizedPrompt) -> TextTensors:
    """The ids and labels, (L,) int64, positions from 0, and bounds, (m, 2) int64, half open."""
    import torch  # not at the top: a check of data makes no tensor

    return {
        "input_ids": _int64(rendered.input_ids),
        "labels": _int64(rendered.labels),
        "position_ids": torch.from_numpy(np.arange(len(rendered.input_ids), dtype=np.int64)),
        "image_bound": _int64(rendered.image_bounds).reshape(-1, 2),
        "audio_bound": _int64(rendered.audio_bounds).reshape(-1, 2),
    }


def _int64(values: Sequence[int] | Sequence[tuple[int, int]]) -> torch.Tensor:
    import torch

    # Via numpy: torch takes several times as long to convert a list.
    return torch.from_numpy(np.array(values, np.int64))
