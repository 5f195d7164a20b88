"""How images reach the network: pixels of a sample, and their place in a batch; one entry per kind of network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from PIL.Image import Image

from finetune.encoding.example import Example
from finetune.encoding.video_frames import Shown
from finetune.media import fast_image, image, transformers_processor
from finetune.media.patches import patchify
from finetune.media.slicing import SlicePlan, SliceSpec

Pictures = Iterable[Shown]
Grids = list[tuple[int, int]]
ImageBackend = Literal["pillow", "fast"]
"""What decodes and resizes images; families with a published processor keep its resizing."""
Tensors = dict[str, torch.Tensor]
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Backend:
    """How image files become patches.

    Attributes:
        cut: decoded pictures to patches (N, 3*P*P), and rows and columns of patches of every item.
        read: decodes files.
    """

    cut: Callable[[Pictures, SliceSpec], tuple[torch.Tensor, Grids]]
    read: image.Reader = image.left_to_pillow


@dataclass(frozen=True, slots=True)
class PixelInputs:
    """One way for images into a network.

    Attributes:
        dtype: of the patches.
        backends: how image files become patches, by the name of --image_backend.
        collect: what a batch has besides ids, mask and labels, from its examples, batch row and first position of
            each, and the shape (B, T).
    """

    dtype: torch.dtype
    backends: Mapping[ImageBackend, Backend]
    collect: Callable[[Sequence[Example], Sequence[Place], tuple[int, int]], Tensors]


def _by_pillow(pictures: Pictures, spec: SliceSpec) -> tuple[torch.Tensor, Grids]:
    return _patches(pictures, spec, image.cut)


def _by_torch(pictures: Pictures, spec: SliceSpec) -> tuple[torch.Tensor, Grids]:
    return _patches(pictures, spec, fast_image.cut)


def _patches(
    pictures: Pictures, spec: SliceSpec, cut_one: Callable[[Image, SlicePlan], list[np.ndarray]]
) -> tuple[torch.Tensor, Grids]:
    items = []
    for shown in pictures:
        cut = [cut_one(picture, shown.cuts) for picture in shown.pictures]
        # All thumbnails of a group of frames, then all their first slices, and so on: each has its placeholders.
        items += [item for alike in zip(*cut, strict=True) for item in alike]
    side = spec.patch_size
    grids = [(item.shape[0] // side, item.shape[1] // side) for item in items]
    return torch.from_numpy(patchify(items, side)), grids


def _by_processor(pictures: Pictures, spec: SliceSpec, maker: str = "MiniCPMV4_6") -> tuple[torch.Tensor, Grids]:
    cut = [
        transformers_processor.patch_rows(picture, shown.cuts, spec, maker=maker, video=shown.video)
        for shown in pictures
        for picture in shown.pictures
    ]
    if not cut:
        return torch.zeros(0, 3 * spec.patch_size**2), []
    return torch.cat([rows for rows, _ in cut]), [size for _, grids in cut for size in grids]


def _bounded(examples: Sequence[Example], places: Sequence[Place], shape: tuple[int, int]) -> Tensors:
    """Patches as they are, and where each item's placeholders stand."""
    positions = torch.zeros(shape, dtype=torch.int64)
    bounds, heard = [], []
    for example, (row, start) in zip(examples, places, strict=True):
        positions[row, start : start + len(example.position_ids)] = example.position_ids
        bounds.append(_of_row(row, example.image_bound + start))
        heard.append(_of_row(row, example.audio_bound + start))
    return {
        "position_ids": positions,
        "patches": _joined([example.patches for example in examples]),
        "tgt_sizes": torch.cat([example.tgt_sizes for example in examples]),
        "image_bound": torch.cat(bounds),
        "temporal_ids": torch.cat([example.temporal_ids for example in examples]),
        **_groups(examples),
        **_sound([clip for example in examples for clip in example.audio], torch.cat(heard)),
    }


def _joined(patches: list[torch.Tensor]) -> torch.Tensor:
    """All patches one after another; of a single example they are not copied."""
    return patches[0] if len(patches) == 1 else torch.cat(patches)


def _groups(examples: Sequence[Example]) -> Tensors:
    """Items per run of placeholders; nothing where every item has its own."""
    if all(example.group_sizes is None for example in examples):
        return {}
    return {"group_sizes": torch.cat([_sizes(example) for example in examples])}


def _sizes(example: Example) -> torch.Tensor:
    given = example.group_sizes
    return torch.ones(len(example.image_bound), dtype=torch.int64) if given is None else given


def _of_row(row: int, bounds: torch.Tensor) -> torch.Tensor:
    """Bounds (m, 2) with the number of their batch row in front, (m, 3)."""
    return torch.cat([torch.full((len(bounds), 1), row, dtype=torch.int64), bounds], dim=1)


def _sound(clips: Sequence[torch.Tensor], bounds: torch.Tensor) -> Tensors:
    """The clips of the batch, padded with 0 to the longest; without sound nothing."""
    if not clips:
        return {}
    frames = [clip.shape[1] for clip in clips]
    features = torch.zeros(len(clips), clips[0].shape[0], max(frames))
    for clip, into in zip(clips, features, strict=True):
        into[:, : clip.shape[1]] = clip
    return {"audio_features": features, "audio_lengths": torch.tensor(frames), "audio_bound": bounds}


def _packed(examples: Sequence[Example], places: Sequence[Place], shape: tuple[int, int]) -> Tensors:
    """All patches of the images of the batch side by side, and those of its videos; as transformers has it."""
    sizes = torch.cat([example.tgt_sizes for example in examples])
    patches = _joined([example.patches for example in examples])
    moving = torch.cat([_moving(example) for example in examples])
    owners = moving.repeat_interleave(sizes.prod(1))
    return {
        **_side_by_side(patches[~owners], sizes[~moving], ""),
        **_side_by_side(patches[owners], sizes[moving], "_videos"),
    }


def _side_by_side(patches: torch.Tensor, sizes: torch.Tensor, suffix: str) -> Tensors:
    if not len(patches):
        return {}
    side = round((patches.shape[1] / 3) ** 0.5)
    pixels = patches.reshape(-1, 3, side, side).permute(1, 2, 0, 3).reshape(1, 3, side, -1)
    return {f"pixel_values{suffix}": pixels, f"target_sizes{suffix}": sizes}


def _moving(example: Example) -> torch.Tensor:
    """(n,) whether an item comes from a video."""
    given = example.from_video
    return torch.zeros(len(example.tgt_sizes), dtype=torch.bool) if given is None else given


def _typed(examples: Sequence[Example], places: Sequence[Place], shape: tuple[int, int]) -> Tensors:
    """As packed, and which positions are an image's or a video's: the network computes position ids from them."""
    types = torch.zeros(shape, dtype=torch.int64)
    for example, (row, start) in zip(examples, places, strict=True):
        for (first, last), moving in zip(example.image_bound.tolist(), _moving(example).tolist(), strict=True):
            types[row, start + first : start + last] = 2 if moving else 1
    return {"mm_token_type_ids": types, **_packed(examples, places, shape)}


INPUTS = {
    "patches": PixelInputs(
        torch.uint8, {"pillow": Backend(_by_pillow), "fast": Backend(_by_torch, fast_image.read)}, _bounded
    ),
    "packed": PixelInputs(torch.float32, {"pillow": Backend(_by_processor)}, _packed),
    "canvas": PixelInputs(torch.float32, {"pillow": Backend(_by_processor)}, _typed),
    "packed_print": PixelInputs(
        torch.float32, {"pillow": Backend(partial(_by_processor, maker="MiniCPMOcr"))}, _packed
    ),
}
