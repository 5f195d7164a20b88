"""Loads images (EXIF orientation, pixel limits), resizes them as Pillow does, and cuts them into slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from finetune.media.bit_depth import is_deep, to_grey
from finetune.media.image_files import UnreadableError, check_end, open_image, orientation, reading, upright_size
from finetune.media.resample import PILLOW_13, Size, resize_height, resize_width, resize_widths, vertical_first
from finetune.media.slicing import SlicePlan, crop_boxes
from finetune.sample import DataError, Media
from finetune.utils.errors import UserError
from finetune.utils.file_types import told
from finetune.utils.quoting import reason

MAX_PIXELS = 89_478_485
"""Maximum number of pixels of an image: Pillow's threshold for decompression bombs, here an error."""

Reader = Callable[[Path, Image.Image], Image.Image | None]
"""Decodes a file, given its opened header, to RGB without EXIF orientation; None to let Pillow decode it."""

_BAND_BYTES = 15 << 20
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def size(media: Media, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels with EXIF orientation applied; only the header of a file is read.

    Raises:
        DataError: no such file, not an image, or more than ``max_pixels``.
    """
    with _opened(media, max_pixels) as image:
        return upright_size(image)[0]


def shrunk(size: tuple[int, int], most: int | None) -> tuple[int, int]:
    """(width, height) downscaled to at most ``most`` pixels with the same aspect ratio, sides rounded down.

    The rule of LLaMA-Factory's image_max_pixels.
    """
    width, height = size
    if most is None or width * height <= most:
        return size
    factor = math.sqrt(most / (width * height))
    return max(int(width * factor), 1), max(int(height * factor), 1)


def left_to_pillow(path: Path, header: Image.Image) -> None:
    """The ``Reader`` that lets Pillow decode every file."""


def load(media: Media, max_pixels: int = MAX_PIXELS, read: Reader = left_to_pillow) -> Image.Image:
    """The decoded image as RGB with EXIF orientation applied; an alpha channel is dropped, not blended.

    Greyscale of more than 8 bits is converted by ``finetune.media.bit_depth``.

    Args:
        media: image to decode.
        max_pixels: maximum number of pixels.
        read: file decoder; Pillow decodes where it returns None.

    Raises:
        DataError: as ``size``, and data that is truncated or damaged.
    """
    with _opened(media, max_pixels) as image:
        turn = _TURN.get(orientation(image))
        decoded = read(media.data, image) if isinstance(media.data, Path) else None
        if decoded is None:
            with reading():
                image.load()
            decoded = _rgb(image)
    return decoded if turn is None else decoded.transpose(turn)


def resized(image: Image.Image, sizes: Sequence[Size]) -> list[np.ndarray]:
    """The pixels of an RGB image in other sizes (width, height), bit-identical to Pillow's bicubic resize."""
    sideways = [size for size in sizes if size[0] != image.width and not vertical_first(image.size, size)]
    narrow = dict(zip(sideways, _narrow(image, [width for width, _ in sideways]), strict=True))
    return [resize_height(narrow[size], size[1]) if size in narrow else _height_first(image, size) for size in sizes]


def _narrow(image: Image.Image, widths: Sequence[int]) -> list[np.ndarray]:
    """The pixels of an RGB image in other widths, in its height."""
    if not widths:
        return []
    found = np.empty((image.height, sum(widths), 4), np.uint8)
    top = 0
    for band in bands(image):
        part = array(band, image.width)
        resize_widths(part, widths, found[top : top + len(part)])
        top += len(part)
    return np.split(found, np.cumsum(widths)[:-1], axis=1)


def _height_first(image: Image.Image, size: Size) -> np.ndarray:
    return resize_width(resize_height(pixels(image), size[1]), size[0])


def slice_image(image: Image.Image, plan: SlicePlan) -> list[np.ndarray]:
    """The visual items of an RGB image: the thumbnail, then the slices row by row; see ``pixels``."""
    thumbnail, *refined = resized(image, [plan.thumbnail] if plan.refined is None else [plan.thumbnail, plan.refined])
    return [thumbnail, *(item for each in refined for item in slices(each, plan))]


def shrink(image: Image.Image, most: int | None) -> Image.Image:
    """The image downscaled to the size of ``shrunk``."""
    size = shrunk(image.size, most)
    return image if size == image.size else from_pixels(resized(image, [size])[0])


def from_pixels(found: np.ndarray) -> Image.Image:
    """An RGB image of these pixels, (height, width, 4) uint8; the inverse of ``pixels``."""
    if not PILLOW_13:  # Pillow 12.2 has fromarrow too, but crashes when the image is exported again
        return Image.frombytes("RGB", (found.shape[1], found.shape[0]), found, "raw", "RGBX")
    cells = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), 4)
    return Image.fromarrow(cells, "RGB", (found.shape[1], found.shape[0]))


def slices(refined: np.ndarray, plan: SlicePlan) -> list[np.ndarray]:
    """The slices of the refined image row by row, as views; all (height, width, channels)."""
    return [refined[top:bottom, left:right] for left, top, right, bottom in crop_boxes(plan)]


def pixels(image: Image.Image) -> np.ndarray:
    """The bytes of an RGB image, (height, width, 4) uint8, possibly read-only; the fourth channel is unused."""
    found = [array(band, image.width) for band in bands(image)]
    return found[0] if len(found) == 1 else np.concatenate(found)


def array(band: pa.UInt8Array, width: int) -> np.ndarray:
    """The bytes of a band as (rows, width, 4) uint8, read only."""
    _, data = band.buffers()  # to_numpy imports pandas, which takes half a second
    assert data is not None
    return np.frombuffer(data, np.uint8, len(band), band.offset).reshape(-1, width, 4)


def bands(image: Image.Image) -> Iterator[pa.UInt8Array]:
    """The bytes of an RGB image from top to bottom, four per pixel, in bands.

    A single zero-copy band for images in one memory block of Pillow (16 MB, or PILLOW_BLOCK_SIZE); copies otherwise.
    """
    whole = _memory(image)
    if whole is not None:
        yield whole
        return
    rows = max(_BAND_BYTES // (4 * image.width), 1)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        found = _memory(band)
        # PILLOW_BLOCK_SIZE may be smaller than a band.
        yield pa.array(np.asarray(band.convert("RGBA")).reshape(-1)) if found is None else found


def _memory(image: Image.Image) -> pa.UInt8Array | None:
    """Pillow's own memory of an image; None if it has several blocks."""
    try:
        return pa.array(image).flatten()
    except ValueError:
        return None


@contextmanager
def _opened(media: Media, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read; errors of opening and decoding become DataError."""
    try:
        if isinstance(media.data, Path):
            with open_image(media.data) as image:
                _check_pixels(image, media, max_pixels)
                check_end(image, media.data)
                yield image
        elif isinstance(media.data, Image.Image):
            _check_pixels(media.data, media, max_pixels)
            yield media.data
        else:
            raise DataError(f"{media} is not an image; give the path of an image or a PIL image")
    except UserError:
        raise
    except UnreadableError as error:
        known = told(media.data) if isinstance(media.data, Path) else None
        raise DataError(f"{media} {known or error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{media} does not exist; correct the path or remove the record") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{media} cannot be read ({reason(error)}); replace it or remove the record") from error


def _check_pixels(image: Image.Image, media: Media, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{media} is empty ({width} x {height} pixels); replace it or remove the record")
    if width * height > max_pixels:
        raise DataError(
            f"{media} has {width} x {height} = {width * height} pixels, the limit is {max_pixels}; "
            "shrink the image, or raise --max_image_pixels if it is meant to be that large"
        )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if is_deep(image):
        # Pillow would clip values above 255.
        return to_grey(image).convert("RGB")
    with reading():
        if image.mode == "P" and "transparency" in image.info:
            # Via RGBA, or Pillow warns about every such file.
            image = image.convert("RGBA")
        return image.convert("RGB")
