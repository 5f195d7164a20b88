import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from finetune.media import image
from finetune.media.patches import patchify
from finetune.media.slicing import SliceSpec, item_sizes, plan
from finetune.sample import DataError, Media


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze() if channels == 1 else values, mode)


def on_disk(picture: Image.Image, path: Path, **options: Any) -> Media:
    picture.save(path, **options)
    return Media("image", path)


def test_patches_are_channel_row_column_and_row_major() -> None:
    picture = noise(42, 28)
    pixels = np.asarray(picture)
    wider = Image.new("RGB", (70, 28))
    wider.paste(picture, (14, 0))
    patches = patchify([image.pixels(picture), image.pixels(wider)[:, 14:56]], 14)
    assert patches.shape == (2 * 6, 3 * 14 * 14)
    assert patches.dtype == np.uint8
    for row in range(2):
        for column in range(3):
            block = pixels[row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
            assert (patches[row * 3 + column].reshape(3, 14, 14) == block.transpose(2, 0, 1)).all()
    assert (patches[:6] == patches[6:]).all()
    assert patches.flags.writeable


def test_no_image_gives_no_patch() -> None:
    assert patchify([], 14).shape == (0, 588)


def test_items_follow_the_plan(tmp_path: Path) -> None:
    media = on_disk(noise(640, 480), tmp_path / "a.png")
    cuts = plan(640, 480, SliceSpec(9, 448, 14))
    items = image.slice_image(image.load(media), cuts)
    assert [(item.shape[1], item.shape[0]) for item in items] == item_sizes(cuts)
    assert all(item.shape[2] == 4 for item in items)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    media = on_disk(noise(40, 24), tmp_path / f"turned.{suffix}", exif=exif)
    with Image.open(tmp_path / f"turned.{suffix}") as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    decoded = image.load(media)
    assert expected.size == ((24, 40) if orientation >= 5 else (40, 24))
    assert image.size(media) == expected.size == decoded.size
    assert decoded.tobytes() == expected.tobytes()


def test_exif_of_an_opened_image_counts_as_well(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    media = on_disk(noise(40, 24), tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        given = Media("image", opened)
        assert image.size(given) == (24, 40)
        assert image.load(given).tobytes() == image.load(media).tobytes()


def test_unreadable_exif_turns_nothing(tmp_path: Path) -> None:
    media = on_disk(noise(40, 24), tmp_path / "a.jpg", exif=b"Exif\x00\x00garbage!")
    assert image.size(media) == image.load(media).size == (40, 24)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "CMYK", "1"])
def test_modes_become_rgb_as_convert_does(tmp_path: Path, mode: str) -> None:
    picture = noise(20, 10, "RGBA").convert(mode)
    media = on_disk(picture, tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    decoded = image.load(media)
    assert decoded.mode == "RGB"
    assert decoded.tobytes() == picture.convert("RGB").tobytes()


def test_alpha_is_dropped_not_blended() -> None:
    picture = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert image.load(Media("image", picture)).getpixel((0, 0)) == (200, 100, 50)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (body, b"IDAT" + zlib.compress(b"\x00"), b"IEND")
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_size_reads_the_header_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(3000, 2000))
    media = Media("image", tmp_path / "a.png")
    assert image.size(media) == (3000, 2000)
    with pytest.raises(DataError, match="cannot be decoded"):
        image.load(media)


@pytest.mark.parametrize("sides", [(9500, 9500), (15_000, 15_000), (100_000, 100_000)])
@pytest.mark.parametrize("read", [image.size, image.load])
def test_decompression_bomb(tmp_path: Path, sides: tuple[int, int], read: object) -> None:
    assert callable(read)
    (tmp_path / "bomb.png").write_bytes(png_header(*sides))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=r"^image .*bomb.png has .*pixels"):
            read(Media("image", tmp_path / "bomb.png"))


def test_limit_is_a_parameter() -> None:
    media = Media("image", noise(10, 10))
    assert image.size(media, max_pixels=100) == (10, 10)
    with pytest.raises(DataError, match="10 x 10 = 100 pixels, the limit is 99; shrink the image, or raise"):
        image.size(media, max_pixels=99)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^image .*nowhere.png does not exist; correct the path or remove"):
        image.size(Media("image", tmp_path / "nowhere.png"))


def test_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"^image .*a.png is a web page"):
        image.size(Media("image", tmp_path / "a.png"))
    with pytest.raises(DataError, match=r"^image .*cannot be read .*directory"):
        image.size(Media("image", tmp_path))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    noise(200, 200).save(buffer, kind)
    (tmp_path / "cut").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    media = Media("image", tmp_path / "cut")
    words = r"^image .*cannot be decoded .*truncated.*replace it or remove"
    if kind == "JPEG":
        assert image.size(media) == (200, 200)
    else:  # whose end is looked for at once
        with pytest.raises(DataError, match=words):
            image.size(media)
    with pytest.raises(DataError, match=words):
        image.load(media)


def test_shrunk_as_llama_factory_does():
    """1000 x 500 to at most 589824 pixels stays; 2000 x 1000 is multiplied by the root of 589824 / 2000000."""
    assert image.shrunk((1000, 500), 589824) == (1000, 500)
    assert image.shrunk((2000, 1000), 589824) == (1086, 543)
    assert image.shrunk((2000, 1000), None) == (2000, 1000)
    assert image.shrunk((10000, 2), 100) == (707, 1)
