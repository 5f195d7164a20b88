"""How far a picture or a part of it is enlarged, by the print that is in it: the rule of MiniCPM-OCR's processor."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from PIL import Image

from finetune.media.slicing import Box
from finetune.utils.errors import UserError

INSTALL = "pip install -e '.[ocr]'"


def check_installed() -> None:
    """Checks that there is what looks for print.

    Raises:
        UserError: OpenCV is missing; it names the remedy.
    """
    if find_spec("cv2") is None:
        raise UserError(
            "this checkpoint enlarges small print (small_image_upsize 'adaptive' of its image processor), which needs "
            f"OpenCV: {INSTALL}"
        )


class SmallPrint:
    """A decoded picture that says how far its parts are to be enlarged (a ``Look``); each is looked at once.

    Args:
        picture: RGB.
        square: side in pixels of the square that small print is enlarged to.
    """

    def __init__(self, picture: Image.Image, square: int) -> None:
        self.size = picture.size
        self._pixels = np.asarray(picture).transpose(2, 0, 1)
        self._square = square
        self._known: dict[Box, int | None] = {}

    def __call__(self, box: Box) -> int | None:
        """The side of the square that a part is enlarged to; None to leave it small."""
        from transformers.models.minicpm_ocr.image_processing_minicpm_ocr import adaptive_upsize_resolution

        if box not in self._known:
            left, top, right, bottom = box
            self._known[box] = adaptive_upsize_resolution(self._pixels[:, top:bottom, left:right], self._square)
        return self._known[box]
