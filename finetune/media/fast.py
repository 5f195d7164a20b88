"""Images cut by torch's resizing of bytes: several times as fast as Pillow's, nearly all bytes the same."""

from __future__ import annotations

import numpy as np
import PIL
import torch
from PIL import Image

from finetune.media.image import memory, slices
from finetune.media.slicing import Plan

_VERTICAL_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def cut(image: Image.Image, plan: Plan) -> list[np.ndarray]:
    """As ``finetune.media.image.cut``, with some bytes one level off: torch has the same filter in fewer bits."""
    whole = torch.from_dlpack(memory(image)).view(1, image.height, image.width, 4).permute(0, 3, 1, 2)
    items = [_resized(whole, plan.thumbnail)]
    if plan.refined is not None:
        items += slices(_resized(whole, plan.refined), plan)
    return [item[..., :3] for item in items]


def _resized(whole: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """(1, 4, H, W) uint8, channels last, to (height, width, 4) uint8."""
    height, width = whole.shape[2:]
    # The bytes between the two passes are rounded, so their order shows; of Pillow's we follow the rule of 13.
    if _VERTICAL_FIRST and size[1] < height and height - size[1] > 2 * (width - size[0]):
        whole = _interpolated(whole, (width, size[1]))
    return _interpolated(whole, size)[0].permute(1, 2, 0).numpy()


def _interpolated(whole: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(whole, size=(size[1], size[0]), mode="bicubic", antialias=True)
