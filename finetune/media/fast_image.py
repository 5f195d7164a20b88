"""``--image_backend fast``: JPEG decoding by simplejpeg, straight into the layout that is resized."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from finetune.media.image import from_pixels

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
