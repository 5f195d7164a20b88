"""Thumbnails embedded in a page: JPEG data URIs that fit a byte budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from PIL import Image

_View = TypeVar("_View")


class EmbeddedImage(NamedTuple):
    """An image embedded in a page.

    Attributes:
        uri: its JPEG as a data URI.
        width: pixels.
        height: pixels.
    """

    uri: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Detail:
    """Level of detail of the images of a page.

    Attributes:
        side: maximum pixels along the longer side of a full image.
        tile: the same for a slice, or for one of many images.
        quality: JPEG quality.
        tiles: maximum number of images per sample, full ones and slices.
    """

    side: int
    tile: int
    quality: int
    tiles: int


DETAILS = (
    Detail(640, 224, 78, 80),
    Detail(560, 160, 72, 60),
    Detail(448, 128, 65, 40),
    Detail(320, 96, 55, 24),
    Detail(240, 72, 45, 12),
    Detail(192, 64, 35, 6),
)
"""Levels from the finest to the coarsest."""


def jpeg(image: Image.Image, side: int, quality: int) -> EmbeddedImage:
    """The image, downscaled to at most ``side`` pixels along its longer side."""
    shown = image if image.mode == "RGB" else image.convert("RGB")
    shown = shown.copy() if shown is image else shown
    shown.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    written = io.BytesIO()
    shown.save(written, "JPEG", quality=quality)
    return EmbeddedImage(f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}", *shown.size)


def within(budget: int, make: Callable[[Detail], _View], weigh: Callable[[_View], int]) -> _View:
    """The result at the finest level of detail that fits into ``budget`` bytes, else at the coarsest."""
    made = make(DETAILS[0])
    for detail in DETAILS[1:]:
        if weigh(made) <= budget:
            break
        made = make(detail)
    return made


def weight(images: Sequence[EmbeddedImage]) -> int:
    """Bytes of embedded images."""
    return sum(len(image.uri) for image in images)
