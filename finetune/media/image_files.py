"""Opens image files with Pillow: allowed formats, truncation checks, EXIF orientation, decoder errors."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from finetune.sample import DataError
from finetune.utils.file_types import told

# fmt: off
FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "ICO", "ICNS", "CUR", "DIB", "PCX",
    "DCX", "SGI", "SUN", "MSP", "XBM", "XPM", "DDS", "PSD", "TGA",
)
# fmt: on
"""Supported formats by Pillow's names. Excluded: EPS and WMF (rendered by other programs), stubs without a decoder
(BUFR, GRIB, HDF5, MPEG), and rare formats whose decoders are little used. TGA has no signature and is tried last."""

DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
    struct.error,
    zlib.error,
)
"""Exceptions that Pillow's decoders raise for damaged data."""

BOMB_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises above its own pixel limit."""

_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)
_END = b"\0\0\0\0IEND\xaeB`\x82"


class UnreadableError(Exception):
    """An image that cannot be read; the message is a reason without its subject, the caller adds the file."""


def open_image(file: Path | BinaryIO) -> Image.Image:
    """An image of one of FORMATS with its header read.

    Raises:
        UnreadableError: Pillow refuses it, or it has too many pixels.
        OSError: the file cannot be opened.
    """
    with reading():
        return Image.open(file, formats=FORMATS)


def check_end(image: Image.Image, file: Path | BinaryIO) -> None:
    """Checks that a PNG file has its end chunk, which Pillow does not require.

    Raises:
        UnreadableError: it is truncated.
    """
    if image.format == "PNG" and not _ends(file):
        raise UnreadableError(
            "cannot be decoded (a PNG file without IEND chunk); it is truncated: replace it or remove the record"
        )


def decode(data: bytes, what: str = "the image") -> Image.Image:
    """An image from the bytes of a file, with its header read.

    Args:
        data: the bytes.
        what: name of the image in errors.

    Raises:
        DataError: they are not an image, or it has too many pixels.
    """
    file = io.BytesIO(data)
    try:
        image = open_image(file)
        check_end(image, file)
        return image
    except UnreadableError as error:
        raise DataError(f"{what} ({len(data)} bytes) {told(data) or error}") from error


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, it is unreadable, or Pillow applies it itself."""
    if image.format == "TIFF":
        return 1
    try:
        # The method of the base class: that of PNG decodes all pixels to find EXIF data after them.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except DECODER_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[tuple[int, int], bool]:
    """(width, height) with the EXIF orientation applied, and whether the orientation changes the image."""
    turn = orientation(image)
    width, height = image.size
    return ((height, width) if turn in _SWAPS_SIDES else (width, height)), turn != 1


@contextmanager
def reading() -> Iterator[None]:
    """Turns errors of Pillow's decoders into UnreadableError; use it around calls of Pillow only.

    Raises:
        UnreadableError: data that is damaged, too large or not in a supported format.
        OSError: errors of the file system.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableError(
            "is not an image in a supported format; save it as PNG or JPEG, or remove the record"
        ) from error
    except BOMB_ERRORS as error:
        raise UnreadableError(
            f"has too many pixels for Pillow whatever --max_image_pixels is ({error}); shrink it or remove the record"
        ) from error
    except DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableError(
            f"cannot be decoded ({str(error) or type(error).__name__}); the file is truncated, damaged or not "
            "readable: replace it or remove the record"
        ) from error


def _ends(file: Path | BinaryIO) -> bool:
    """Whether a PNG file has its IEND chunk; data may follow it. The position of an open file is restored."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return _ends(opened)
    here = file.tell()
    try:
        size = file.seek(0, 2)
        file.seek(max(size - len(_END), 0))
        if file.read(len(_END)) == _END:
            return True
        at = 8
        while at + 8 <= size:
            file.seek(at)
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind == b"IEND":
                return at + len(_END) <= size
            at += 12 + length
        return False
    finally:
        file.seek(here)
