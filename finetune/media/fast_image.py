"""Images decoded by simplejpeg and resized by torch's kernel for bytes: faster, with nearly all bytes the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from finetune.media import image as exact
from finetune.media.image import bands, from_pixels
from finetune.media.resample import Size, vertical_first
from finetune.media.slicing import SlicePlan

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_JPEG = ("JPEG", "MPO")  # The second is what some cameras write: Pillow, too, takes its first picture.


def read(path: Path, header: Image.Image) -> Image.Image | None:
    """The pixels of a JPEG file in colour by simplejpeg, where it is installed; what it refuses is left to Pillow.

    Both decode by libjpeg-turbo, and agree to the bit when both have the same version of it.
    """
    if simplejpeg is None or header.format not in _JPEG or header.mode != "RGB":
        return None
    try:
        pixels = simplejpeg.decode_jpeg(path.read_bytes(), "RGBX")
    except ValueError:
        return None
    return from_pixels(pixels)


def cut(image: Image.Image, plan: SlicePlan) -> list[np.ndarray]:
    """As ``finetune.media.image.cut``, with some bytes one level off: torch has the same filter in fewer bits."""
    return exact.cut(image, plan, _resized)


def _resized(image: Image.Image, sizes: Sequence[Size]) -> list[np.ndarray]:
    """The image in several sizes (width, height), each (height, width, 4) uint8."""
    found = [_tensor(band, image.width) for band in bands(image)]
    return [_in_order(found, image.size, size) for size in sizes]


def _in_order(parts: list[torch.Tensor], old: Size, new: Size) -> np.ndarray:
    if vertical_first(old, new):
        pixels = _interpolated(_interpolated(torch.cat(parts, 2), (old[0], new[1])), new)
    elif len(parts) == 1:
        pixels = _interpolated(parts[0], new)
    else:
        # Made narrow part by part, which spares a copy of the whole.
        narrow = [_interpolated(part, (new[0], part.shape[2])) for part in parts]
        pixels = _interpolated(torch.cat(narrow, 2), new)
    return pixels[0].permute(1, 2, 0).numpy()


def _tensor(band: pa.UInt8Array, width: int) -> torch.Tensor:
    """(1, 4, rows, width) uint8, channels last; the fourth channel means nothing."""
    return torch.from_dlpack(band).view(1, -1, width, 4).permute(0, 3, 1, 2)


def _interpolated(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    return torch.nn.functional.interpolate(pixels, size=(size[1], size[0]), mode="bicubic", antialias=True)
