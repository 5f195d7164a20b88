"""Adaptive upscaling of images with small print: ``adaptive_upsize_resolution`` of MiniCPM-OCR's image processor."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from PIL import Image

from finetune.media.slicing import Box
from finetune.utils.errors import UserError

INSTALL = "pip install -e '.[ocr]'"


def check_installed() -> None:
    """Checks that OpenCV is installed, which the detection of small print needs.

    Raises:
        UserError: it is missing.
    """
    if find_spec("cv2") is None:
        raise UserError(
            "this checkpoint upscales small print (small_image_upsize 'adaptive' of its image processor), which needs "
            f"OpenCV: {INSTALL}"
        )


class SmallPrint:
    """The ``UpsizeRule`` of a decoded image, cached by region.

    Args:
        image: RGB.
        square: side in pixels of the square that small print is upscaled to.
    """

    def __init__(self, image: Image.Image, square: int) -> None:
        self.size = image.size
        self._pixels = np.asarray(image).transpose(2, 0, 1)
        self._square = square
        self._known: dict[Box, int | None] = {}

    def __call__(self, box: Box) -> int | None:
        """The side in pixels of the square that a region is upscaled to; None for no upscaling."""
        from transformers.models.minicpm_ocr.image_processing_minicpm_ocr import adaptive_upsize_resolution

        if box not in self._known:
            left, top, right, bottom = box
            self._known[box] = adaptive_upsize_resolution(self._pixels[:, top:bottom, left:right], self._square)
        return self._known[box]
