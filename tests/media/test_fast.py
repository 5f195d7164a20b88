"""Torch's resizing of bytes against Pillow's, on shapes drawn at random."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from finetune.media import fast, image
from finetune.media.patches import patchify
from finetune.media.slicing import Plan, SliceSpec, plan

SPEC = SliceSpec(9, 448, 14)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def photo(width: int, height: int) -> Image.Image:
    """Noise that is smooth, as photographs are nearly everywhere."""
    small = noise(max(width // 8, 2), max(height // 8, 2))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def levels(picture: Image.Image, cuts: Plan) -> np.ndarray:
    """By how many levels the bytes of all items differ."""
    pairs = list(zip(fast.cut(picture, cuts), image.cut(picture, cuts), strict=True))
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
    assert (levels(noise(*size), Plan(thumbnail)) > 0).mean() < 0.011


def test_sizes_that_stay_are_the_same_bytes() -> None:
    picture = noise(140, 84)
    assert not levels(picture, Plan((140, 84), (2, 1), (140, 84), (70, 84))).any()


@pytest.mark.parametrize("thumbnail", [(56, 42), (2058, 42), (56, 2310)])
def test_large_pictures_come_in_pieces(thumbnail: tuple[int, int]) -> None:
    """Above 16 MiB Pillow keeps a picture in several pieces of memory."""
    picture = photo(2100, 2300)
    assert (image.pixels(picture)[..., :3] == np.asarray(picture)).all()
    assert (levels(picture, Plan(thumbnail)) > 0).mean() < 0.011


def test_memory_in_other_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an environment variable of Pillow can have it."""
    monkeypatch.setattr(image, "_ONE_PIECE", 1 << 30)
    picture = photo(2100, 2300)
    assert (image.pixels(picture)[..., :3] == np.asarray(picture)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5, 7000), (13, 600), (448, 448)])
@pytest.mark.parametrize("cut", [image.cut, fast.cut])
def test_thin_pictures_become_patches_too(
    cut: Callable[[Image.Image, Plan], list[np.ndarray]], size: tuple[int, int]
) -> None:
    items = cut(noise(*size), plan(*size, SPEC))
    patches = patchify(items, 14)
    last = items[-1][-14:, -14:, :3]
    assert (patches[-1].reshape(3, 14, 14) == last.transpose(2, 0, 1)).all()
    assert len(patches) == sum(item.shape[0] * item.shape[1] for item in items) // 196
