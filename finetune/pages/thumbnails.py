"""Pictures inside a page: small JPEGs, as large as the room that a page has for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from PIL import Image

_View = TypeVar("_View")


class Picture(NamedTuple):
    """A picture as it stands in a page.

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
    """How finely pictures are shown.

    Attributes:
        side: most pixels along a side of a whole picture.
        tile: the same of a part of one, or of one of many.
        quality: of the JPEGs.
        tiles: most pictures of a sample, whole ones and tiles.
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
"""From the finest to the coarsest."""


def jpeg(picture: Image.Image, side: int, quality: int) -> Picture:
    """The picture, shrunk to so many pixels along its longer side; a smaller one keeps its size."""
    shown = picture if picture.mode == "RGB" else picture.convert("RGB")
    shown = shown.copy() if shown is picture else shown
    shown.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    written = io.BytesIO()
    shown.save(written, "JPEG", quality=quality)
    return Picture(f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}", *shown.size)


def within(room: int, make: Callable[[Detail], _View], weigh: Callable[[_View], int]) -> _View:
    """What is made in the finest detail that fits into so many bytes, else in the coarsest."""
    made = make(DETAILS[0])
    for detail in DETAILS[1:]:
        if weigh(made) <= room:
            break
        made = make(detail)
    return made


def weight(pictures: Sequence[Picture]) -> int:
    """Bytes of pictures in a page."""
    return sum(len(picture.uri) for picture in pictures)
