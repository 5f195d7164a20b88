"""``--image_backend fast``: simplejpeg decoding and torch uint8 resizing; a few pixel values differ by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from finetune.media import image as exact
from finetune.media.image import bands, from_pixels
from finetune.media.resample import Size, vertical_first
from finetune.media.slicing import SlicePlan

if TYPE_CHECKING:
    import torch

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_JPEG = ("JPEG", "MPO")  # MPO: multi-picture JPEG of some cameras; the first image is used, as in Pillow.


def read(path: Path, header: Image.Image) -> Image.Image | None:
    """The pixels of a colour JPEG file, decoded by simplejpeg; None to use Pillow instead.

    Both use libjpeg-turbo and give identical pixels if they have the same version of it.
    """
    if simplejpeg is None or header.format not in _JPEG or header.mode != "RGB":
        return None
    try:
        pixels = simplejpeg.decode_jpeg(path.read_bytes(), "RGBX")
    except ValueError:
        return None
    return from_pixels(pixels)


def slice_image(image: Image.Image, plan: SlicePlan) -> list[np.ndarray]:
    """As ``finetune.media.image.slice_image``; some pixel values differ by one: torch uses lower precision."""
    return exact.slice_image(image, plan, _resized)


def _resized(image: Image.Image, sizes: Sequence[Size]) -> list[np.ndarray]:
    """The image in several sizes (width, height), each (height, width, 4) uint8."""
    found = [_tensor(band, image.width) for band in bands(image)]
    return [_in_order(found, image.size, size) for size in sizes]


def _in_order(parts: list[torch.Tensor], old: Size, new: Size) -> np.ndarray:
    import torch  # not at the top: most runs use Pillow

    if vertical_first(old, new):
        pixels = _interpolated(_interpolated(torch.cat(parts, 2), (old[0], new[1])), new)
    elif len(parts) == 1:
        pixels = _interpolated(parts[0], new)
    else:
        # Horizontal pass per band, which avoids a copy of the whole image.
        narrow = [_interpolated(part, (new[0], part.shape[2])) for part in parts]
        pixels = _interpolated(torch.cat(narrow, 2), new)
    return pixels[0].permute(1, 2, 0).numpy()


def _tensor(band: pa.UInt8Array, width: int) -> torch.Tensor:
    """(1, 4, rows, width) uint8, channels last; the fourth channel is unused."""
    import torch

    return torch.from_dlpack(band).view(1, -1, width, 4).permute(0, 3, 1, 2)


def _interpolated(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    import torch

    return torch.nn.functional.interpolate(pixels, size=(size[1], size[0]), mode="bicubic", antialias=True)
