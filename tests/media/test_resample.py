"""Our resizing against Pillow's: not one byte may differ."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.media import image
from finetune.media.patches import patchify
from finetune.media.resample import vertical_first
from finetune.media.slicing import SliceSpec, plan

Size = tuple[int, int]


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def checkers(width: int, height: int) -> Image.Image:
    """Black and white side by side, where the filter goes beyond both."""
    values = np.indices((height, width)).sum(0) // 3 % 2 * 255
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def assert_same(picture: Image.Image, *sizes: Size) -> None:
    for size, found in zip(sizes, image.resized(picture, sizes), strict=True):
        wanted = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
        assert (found[..., :3] == wanted).all(), (picture.size, size)


def test_sizes_drawn_at_random() -> None:
    chance = np.random.default_rng(5)
    for old_width, old_height, *new in chance.integers(1, 700, (80, 6)).tolist():
        assert_same(noise(old_width, old_height), (new[0], new[1]), (new[2], new[3]))


@pytest.mark.parametrize(
    "old", [(1, 1), (1, 900), (900, 1), (17, 16), (15, 33), (16, 700), (70_000, 20), (40, 2500), (3, 415)]
)
@pytest.mark.parametrize("new", [(1, 1), (14, 14), (1, 200), (200, 1), (13, 401), (448, 448)])
def test_thin_and_tiny_pictures(old: Size, new: Size) -> None:
    assert_same(checkers(*old), new)


def test_sides_that_stay() -> None:
    picture = noise(140, 84)
    assert_same(picture, (140, 84), (140, 200), (300, 84), (140, 20), (70, 84))


def test_both_orders_of_the_passes() -> None:
    sizes: list[Size] = [(238, 854), (480, 400), (70, 1700)]
    picture = noise(486, 1770)
    found = [vertical_first(picture.size, size) for size in sizes]
    assert found in ([True, True, False], [False, False, False])  # of Pillow 13, and of those before
    assert_same(picture, *sizes)


@pytest.mark.parametrize("block", [None, 1 << 30], ids=["as Pillow keeps it", "as PILLOW_BLOCK_SIZE can have it"])
def test_pixels_of_pictures_in_several_pieces_of_memory(monkeypatch: pytest.MonkeyPatch, block: int | None) -> None:
    if block is not None:
        monkeypatch.setattr(image, "_BAND_BYTES", block)
    picture = noise(2100, 2300)
    assert (image.pixels(picture)[..., :3] == np.asarray(picture)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5, 7000), (13, 600), (448, 448)])
def test_thin_pictures_become_patches_too(size: Size) -> None:
    items = image.slice_image(noise(*size), plan(*size, SliceSpec(9, 448, 14)))
    patches = patchify(items, 14)
    last = items[-1][-14:, -14:, :3]
    assert (patches[-1].reshape(3, 14, 14) == last.transpose(2, 0, 1)).all()
    assert len(patches) == sum(item.shape[0] * item.shape[1] for item in items) // 196


@pytest.mark.parametrize("sizes", [[(56, 42), (2058, 42)], [(56, 2310), (2100, 80)]])
def test_pictures_in_several_pieces_of_memory(sizes: list[Size]) -> None:
    """Above 16 MiB Pillow keeps a picture in several."""
    assert_same(noise(2100, 2300), *sizes)


@pytest.mark.parametrize("most", [None, 60_000, 5_000])
def test_shrunk_pictures(most: int | None) -> None:
    picture = noise(301, 199)
    found = image.shrink(picture, most)
    wanted = picture.resize(image.shrunk(picture.size, most), Image.Resampling.BICUBIC)
    assert found.mode == "RGB"
    assert found.size == wanted.size
    assert (np.asarray(found) == np.asarray(wanted)).all()
    assert (image.pixels(found)[..., :3] == np.asarray(wanted)).all()


def test_processors_without_wide_vectors(tmp_path: Path) -> None:
    """The same code, compiled for the least processor of this architecture."""
    names = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    code = "import test_resample as t; t.assert_same(t.noise(203, 131), (91, 77), (300, 40), (112, 200), (9, 9))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=os.environ | names, check=False)
    assert not done.returncode
    assert list(tmp_path.rglob("resample_passes.*.nbc"))
