"""The fast image backend against Pillow: resizing on shapes drawn at random, and decoding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.media import fast_image, image
from finetune.media.patches import patchify
from finetune.media.slicing import SlicePlan, SliceSpec, plan
from finetune.sample import DataError, Media

SPEC = SliceSpec(9, 448, 14)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def photo(width: int, height: int) -> Image.Image:
    """Noise that is smooth, as photographs are nearly everywhere."""
    small = noise(max(width // 8, 2), max(height // 8, 2))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def levels(picture: Image.Image, cuts: SlicePlan) -> np.ndarray:
    """By how many levels the bytes of all items differ."""
    pairs = list(zip(fast_image.slice_image(picture, cuts), image.slice_image(picture, cuts), strict=True))
    assert all(ours.shape == theirs.shape and ours.dtype == np.uint8 for ours, theirs in pairs)
    return np.concatenate([np.abs(ours.astype(int) - theirs)[..., :3].reshape(-1) for ours, theirs in pairs])


def shapes(count: int) -> list[tuple[int, int]]:
    chance = np.random.default_rng(3)
    return [(int(width), int(height)) for width, height in chance.integers(30, 1700, (count, 2))]


def test_smooth_pictures() -> None:
    """One level off on at most 0.5 % of all bytes."""
    found = np.concatenate([levels(photo(*size), plan(*size, SPEC)) for size in shapes(25)])
    assert (found > 0).mean() < 0.005
    assert (found > 1).mean() < 1e-5
    assert found.max() <= 2


def test_noise_is_the_worst_case() -> None:
    """Every picture on its own: at most 1.1 % of the bytes by one level, one in 50 000 by two."""
    for size in shapes(12):
        found = levels(noise(*size), plan(*size, SPEC))
        assert (found > 0).mean() < 0.011, size
        assert (found > 1).mean() < 2e-5, size
        assert found.max() <= 2, size


@pytest.mark.parametrize(
    ("size", "thumbnail"),
    [
        ((486, 1770), (238, 854)),  # the height shrinks by more than twice as many pixels as the width
        ((300, 200), (280, 160)),  # by exactly twice as many
        ((300, 201), (280, 160)),
        ((100, 300), (140, 280)),  # the width grows
        ((300, 100), (280, 140)),  # the height grows
        ((200, 300), (200, 200)),
    ],
)
def test_order_of_the_passes(size: tuple[int, int], thumbnail: tuple[int, int]) -> None:
    """The other order would change every tenth byte or more."""
    assert (levels(noise(*size), SlicePlan(thumbnail)) > 0).mean() < 0.011


def test_sizes_that_stay_are_the_same_bytes() -> None:
    picture = noise(140, 84)
    assert not levels(picture, SlicePlan((140, 84), (2, 1), (140, 84), (70, 84))).any()


@pytest.mark.parametrize("thumbnail", [(56, 42), (2058, 42), (56, 2310)])
def test_large_pictures_come_in_pieces(thumbnail: tuple[int, int]) -> None:
    """Above 16 MiB Pillow keeps a picture in several pieces of memory."""
    picture = photo(2100, 2300)
    assert (image.pixels(picture)[..., :3] == np.asarray(picture)).all()
    assert (levels(picture, SlicePlan(thumbnail)) > 0).mean() < 0.011


def test_memory_in_other_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an environment variable of Pillow can have it."""
    monkeypatch.setattr(image, "_BAND_BYTES", 1 << 30)
    picture = photo(2100, 2300)
    assert (image.pixels(picture)[..., :3] == np.asarray(picture)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5, 7000), (13, 600), (448, 448)])
@pytest.mark.parametrize("slice_image", [image.slice_image, fast_image.slice_image])
def test_thin_pictures_become_patches_too(
    slice_image: Callable[[Image.Image, SlicePlan], list[np.ndarray]], size: tuple[int, int]
) -> None:
    items = slice_image(noise(*size), plan(*size, SPEC))
    patches = patchify(items, 14)
    last = items[-1][-14:, -14:, :3]
    assert (patches[-1].reshape(3, 14, 14) == last.transpose(2, 0, 1)).all()
    assert len(patches) == sum(item.shape[0] * item.shape[1] for item in items) // 196


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
