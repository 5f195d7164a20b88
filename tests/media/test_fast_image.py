"""The fast image backend against Pillow: what it decodes, and what it leaves to it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.media import fast_image, image
from finetune.sample import DataError, Media


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def photo(width: int, height: int) -> Image.Image:
    """Noise that is smooth, as photographs are nearly everywhere."""
    small = noise(max(width // 8, 2), max(height // 8, 2))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def both(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A file decoded by the fast backend and by Pillow."""
    media = Media("image", path)
    fast_one, pillow = (image.load(media, read=read) for read in (fast_image.read, image.left_to_pillow))
    assert fast_one.mode == pillow.mode == "RGB"
    return np.asarray(fast_one), np.asarray(pillow)


def header_of(path: Path) -> Image.Image:
    with Image.open(path) as found:
        return found


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 30, "subsampling": 0},
        {"subsampling": 1, "progressive": True},
        {"quality": 95, "subsampling": 2, "optimize": True},
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"},
    ],
    ids=["plain", "444", "progressive", "optimised", "turned"],
)
def test_jpeg_files_have_the_same_pixels(tmp_path: Path, options: dict[str, Any]) -> None:
    photo(203, 131).save(tmp_path / "1.jpg", **options)
    assert fast_image.read(tmp_path / "1.jpg", header_of(tmp_path / "1.jpg")) is not None
    ours, pillow = both(tmp_path / "1.jpg")
    assert ours.shape == ((203, 131, 3) if "exif" in options else (131, 203, 3))
    assert (ours == pillow).all()


def test_large_jpeg_files_too(tmp_path: Path) -> None:
    photo(2100, 2300).save(tmp_path / "1.jpg")
    ours, pillow = both(tmp_path / "1.jpg")
    assert (ours == pillow).all()


def test_cameras_files_of_several_pictures(tmp_path: Path) -> None:
    photo(80, 60).save(tmp_path / "1.jpg", "MPO", save_all=True, append_images=[noise(80, 60)])
    header = header_of(tmp_path / "1.jpg")
    assert header.format == "MPO"
    assert fast_image.read(tmp_path / "1.jpg", header) is not None
    ours, pillow = both(tmp_path / "1.jpg")
    assert (ours == pillow).all()


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGB", "webp")])
def test_other_files_are_left_to_pillow(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"1.{suffix}"
    photo(60, 40).convert(mode).save(path)
    assert fast_image.read(path, header_of(path)) is None
    ours, pillow = both(path)
    assert (ours == pillow).all()


def test_pillow_says_what_is_wrong(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    photo(300, 200).save(whole)
    cut.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(DataError, match="cut.jpg cannot be decoded .*truncated"):
        image.load(Media("image", cut), read=fast_image.read)


def test_without_simplejpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_image, "simplejpeg", None)
    photo(60, 40).save(tmp_path / "1.jpg")
    assert fast_image.read(tmp_path / "1.jpg", header_of(tmp_path / "1.jpg")) is None


def test_a_picture_that_was_changed_after_it_was_opened_is_not_read_again(tmp_path: Path) -> None:
    photo(60, 40).save(tmp_path / "1.jpg")
    with Image.open(tmp_path / "1.jpg") as picture:
        picture.load()
        picture.paste((255, 0, 0), (0, 0, 60, 40))
        found = image.load(Media("image", picture), read=fast_image.read)
    assert (np.asarray(found) == (255, 0, 0)).all()
