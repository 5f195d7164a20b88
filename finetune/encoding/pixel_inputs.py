"""Pixel inputs by model type (``INPUTS``): images to patches; and what decodes the files (``READERS``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from finetune.encoding.video_frames import DecodedGroup
from finetune.media import fast_image, image, transformers_processor
from finetune.media.patches import patchify
from finetune.media.slicing import SliceSpec

if TYPE_CHECKING:
    import torch

    Patches = np.ndarray | torch.Tensor

DecodedImages = Iterable[DecodedGroup]
Grids = list[tuple[int, int]]
ImageBackend = Literal["pillow", "fast"]
"""Image decoding: by Pillow, or JPEG files by simplejpeg."""


@dataclass(frozen=True, slots=True)
class PixelInputs:
    """The pixel inputs of one model type.

    Attributes:
        dtype: dtype of the patches.
        cut: decoded images to patches (N, 3*P*P), of numpy or torch, and the (rows, columns) of patches of every item.
    """

    dtype: Literal["uint8", "float32"]
    cut: Callable[[DecodedImages, SliceSpec], tuple[Patches, Grids]]


def _cut(images: DecodedImages, spec: SliceSpec) -> tuple[Patches, Grids]:
    items = []
    for group in images:
        cut = [image.slice_image(frame, group.cuts) for frame in group.images]
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
    "patches": PixelInputs("uint8", _cut),
    "packed": PixelInputs("float32", _by_processor),
    "canvas": PixelInputs("float32", _by_processor),
    "packed_print": PixelInputs("float32", partial(_by_processor, maker="MiniCPMOcr")),
}
READERS: Mapping[ImageBackend, image.Reader] = {"pillow": image.left_to_pillow, "fast": fast_image.read}
"""What decodes image files, by the value of --image_backend."""
