"""Converts greyscale images of more than 8 bits per value to 8 bits."""

from __future__ import annotations

import logging

import numpy as np
from PIL import Image

from finetune.media.image_files import UnreadableError, reading
from finetune.utils.log_once import warn_once

logger = logging.getLogger(__name__)

# Bit depths of cameras and scanners, stored as 16-bit values.
_DEPTHS = (8, 10, 12, 14, 16)
_WHITE = 255


def is_deep(image: Image.Image) -> bool:
    """Whether its values have more than 8 bits; Pillow's own conversion would clip them."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def to_grey(image: Image.Image) -> Image.Image:
    """An image of more than 8 bits in mode "L".

    Integers are taken as 8, 10, 12, 14 or 16-bit values, the smallest depth that holds the maximum, and lose their
    lowest bits; floats range from 0 (black) to 1 (white), or to 255 if a value is above 1.

    Raises:
        UnreadableError: values outside of these ranges, or not finite; or damaged data.
    """
    with reading():
        values = np.asarray(image)
    return Image.fromarray(_of_floats(values) if image.mode == "F" else _of_integers(values))


def _of_integers(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >> _DEPTHS[-1]:
        raise UnreadableError(f"has values from {low} to {high} of unknown range; scale it to 8 or 16 bits")
    bits = next(depth for depth in _DEPTHS if not high >> depth)
    if bits < _DEPTHS[-1]:
        warn_once(logger, f"16-bit images with values below {1 << bits} are read as {bits}-bit images")
    return (values >> (bits - 8)).astype(np.uint8)


def _of_floats(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UnreadableError("has values that are not finite (NaN or infinity); scale it to 8 bits")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > _WHITE:
        raise UnreadableError(
            f"has float values from {low:g} to {high:g} of unknown range; scale it to 8 bits, or to 0 to 1"
        )
    return np.rint(values * (_WHITE if high <= 1 else 1)).astype(np.uint8)
