"""Images cut by torch's resizing of bytes: several times as fast as Pillow's, nearly all bytes the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL
import torch
from PIL import Image

from finetune.media.image import bands, memory, slices
from finetune.media.slicing import Plan

Size = tuple[int, int]
_RULE_OF_13 = int(PIL.__version__.partition(".")[0]) >= 13


def cut(image: Image.Image, plan: Plan) -> list[np.ndarray]:
    """As ``finetune.media.image.cut``, with some bytes one level off: torch has the same filter in fewer bits."""
    sizes = [plan.thumbnail] if plan.refined is None else [plan.thumbnail, plan.refined]
    thumbnail, *refined = _resized(image, sizes)
    return [thumbnail, *(item for each in refined for item in slices(each, plan))]


def _resized(image: Image.Image, sizes: Sequence[Size]) -> list[np.ndarray]:
    """The image in several sizes (width, height), each (height, width, 4) uint8."""
    vertical = [_vertical_first(image.size, size) for size in sizes]
    parts: list[list[torch.Tensor]] = [[] for _ in sizes]
    for band in bands(image):
        for size, first, into in zip(sizes, vertical, parts, strict=True):
            # A large image is made narrow band by band, which spares a copy of it.
            into.append(
                _tensor(band) if first or band is image else _interpolated(_tensor(band), (size[0], band.height))
            )
    whole = [each[0] if len(each) == 1 else torch.cat(each, 2) for each in parts]
    passes = [[(image.width, size[1]), size] if first else [size] for size, first in zip(sizes, vertical, strict=True)]
    return [_steps(each, sizes) for each, sizes in zip(whole, passes, strict=True)]


def _vertical_first(old: Size, new: Size) -> bool:
    """Which pass Pillow makes first: the bytes between the two are rounded, so that their order shows."""
    return _RULE_OF_13 and old[1] > new[1] and old[1] - new[1] > 2 * (old[0] - new[0])


def _steps(pixels: torch.Tensor, sizes: Sequence[Size]) -> np.ndarray:
    for size in sizes:
        pixels = _interpolated(pixels, size)
    return pixels[0].permute(1, 2, 0).numpy()


def _tensor(image: Image.Image) -> torch.Tensor:
    """(1, 4, height, width) uint8, channels last; the fourth channel means nothing."""
    return torch.from_dlpack(memory(image)).view(1, image.height, image.width, 4).permute(0, 3, 1, 2)


def _interpolated(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    return torch.nn.functional.interpolate(pixels, size=(size[1], size[0]), mode="bicubic", antialias=True)
