"""Pixel inputs by model type (``INPUTS``): images to patches, with an image backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL.Image import Image

from finetune.encoding.video_frames import DecodedGroup
from finetune.media import fast_image, image, transformers_processor
from finetune.media.patches import patchify
from finetune.media.slicing import SlicePlan, SliceSpec

if TYPE_CHECKING:
    import torch

    Patches = np.ndarray | torch.Tensor

DecodedImages = Iterable[DecodedGroup]
Grids = list[tuple[int, int]]
ImageBackend = Literal["pillow", "fast"]
"""Image decoding and resizing; families with an image processor in transformers use its resizing."""


@dataclass(frozen=True, slots=True)
class Backend:
    """Image decoding and slicing.

    Attributes:
        cut: decoded images to patches (N, 3*P*P), of numpy or torch, and the (rows, columns) of patches of every item.
        read: decodes image files.
    """

    cut: Callable[[DecodedImages, SliceSpec], tuple[Patches, Grids]]
    read: image.Reader = image.left_to_pillow


@dataclass(frozen=True, slots=True)
class PixelInputs:
    """The pixel inputs of one model type.

    Attributes:
        dtype: dtype of the patches.
        backends: image backends by the value of --image_backend.
    """

    dtype: Literal["uint8", "float32"]
    backends: Mapping[ImageBackend, Backend]


def _by_pillow(images: DecodedImages, spec: SliceSpec) -> tuple[Patches, Grids]:
    return _patches(images, spec, image.slice_image)


def _by_torch(images: DecodedImages, spec: SliceSpec) -> tuple[Patches, Grids]:
    return _patches(images, spec, fast_image.slice_image)


def _patches(
    images: DecodedImages, spec: SliceSpec, cut_one: Callable[[Image, SlicePlan], list[np.ndarray]]
) -> tuple[Patches, Grids]:
    items = []
    for group in images:
        cut = [cut_one(frame, group.cuts) for frame in group.images]
        # All thumbnails of a group of frames, then all first slices, and so on: frames of a group share placeholders.
        items += [item for alike in zip(*cut, strict=True) for item in alike]
    side = spec.patch_size
    grids = [(item.shape[0] // side, item.shape[1] // side) for item in items]
    return patchify(items, side), grids


def _by_processor(images: DecodedImages, spec: SliceSpec, maker: str = "MiniCPMV4_6") -> tuple[Patches, Grids]:
    cut = [
        transformers_processor.patch_rows(frame, group.cuts, spec, maker=maker, video=group.video)
        for group in images
        for frame in group.images
    ]
    if not cut:
        return np.zeros((0, 3 * spec.patch_size**2), np.float32), []
    import torch  # as the processor; not at the top, since a check of data makes no tensor

    return torch.cat([rows for rows, _ in cut]), [size for _, grids in cut for size in grids]


INPUTS = {
    "patches": PixelInputs("uint8", {"pillow": Backend(_by_pillow), "fast": Backend(_by_torch, fast_image.read)}),
    "packed": PixelInputs("float32", {"pillow": Backend(_by_processor)}),
    "canvas": PixelInputs("float32", {"pillow": Backend(_by_processor)}),
    "packed_print": PixelInputs("float32", {"pillow": Backend(partial(_by_processor, maker="MiniCPMOcr"))}),
}
