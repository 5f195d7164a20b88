"""Batch collation of the media by pixel input format (``COLLATION``): patches, sizes, bounds and audio."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from finetune.encoding.example import Example

Tensors = dict[str, torch.Tensor]
Place = tuple[int, int]


def _bounded(examples: Sequence[Example], places: Sequence[Place], shape: tuple[int, int]) -> Tensors:
    """Patches one after another, and the placeholder bounds of each item or group."""
    positions = torch.zeros(shape, dtype=torch.int64)
    image_bounds, audio_bounds = [], []
    for example, (row, start) in zip(examples, places, strict=True):
        positions[row, start : start + len(example.position_ids)] = example.position_ids
        image_bounds.append(_of_row(row, example.image_bound + start))
        audio_bounds.append(_of_row(row, example.audio_bound + start))
    owners = _owners(examples)
    return {
        "position_ids": positions,
        "patches": _joined([example.patches for example in owners]),
        "tgt_sizes": torch.cat([example.tgt_sizes for example in owners]),
        "image_bound": torch.cat(image_bounds),
        "temporal_ids": torch.cat([example.temporal_ids for example in owners]),
        **_groups(owners),
        **_audio([chunk for example in owners for chunk in example.audio], torch.cat(audio_bounds)),
    }


def _owners(examples: Sequence[Example]) -> list[Example]:
    """The examples whose media are collated."""
    return [example for example in examples if not example.borrows_media]


def _joined(patches: list[torch.Tensor]) -> torch.Tensor:
    """All patches one after another; those of a single example are not copied."""
    return patches[0] if len(patches) == 1 else torch.cat(patches)


def _groups(examples: Sequence[Example]) -> Tensors:
    """Items per placeholder run; nothing where every item has its own run."""
    if all(example.group_sizes is None for example in examples):
        return {}
    return {"group_sizes": torch.cat([_sizes(example) for example in examples])}


def _sizes(example: Example) -> torch.Tensor:
    given = example.group_sizes
    return torch.ones(len(example.image_bound), dtype=torch.int64) if given is None else given


def _of_row(row: int, bounds: torch.Tensor) -> torch.Tensor:
    """Bounds (m, 2) with the batch row as first column, (m, 3)."""
    return torch.cat([torch.full((len(bounds), 1), row, dtype=torch.int64), bounds], dim=1)


def _audio(chunks: Sequence[torch.Tensor], bounds: torch.Tensor) -> Tensors:
    """The log-mel chunks of the batch, padded with 0 to the longest; nothing without audio."""
    if not chunks:
        return {}
    frames = [chunk.shape[1] for chunk in chunks]
    features = torch.zeros(len(chunks), chunks[0].shape[0], max(frames))
    for chunk, into in zip(chunks, features, strict=True):
        into[:, : chunk.shape[1]] = chunk
    return {"audio_features": features, "audio_lengths": torch.tensor(frames), "audio_bound": bounds}


def _packed(examples: Sequence[Example], places: Sequence[Place], shape: tuple[int, int]) -> Tensors:
    """All image patches of the batch side by side, and all video patches, in the layout of transformers."""
    examples = _owners(examples)
    sizes = torch.cat([example.tgt_sizes for example in examples])
    patches = _joined([example.patches for example in examples])
    from_video = torch.cat([_from_video(example) for example in examples])
    owners = from_video.repeat_interleave(sizes.prod(1))
    return {
        **_side_by_side(patches[~owners], sizes[~from_video], ""),
        **_side_by_side(patches[owners], sizes[from_video], "_videos"),
    }


def _side_by_side(patches: torch.Tensor, sizes: torch.Tensor, suffix: str) -> Tensors:
    if not len(patches):
        return {}
    side = round((patches.shape[1] / 3) ** 0.5)
    pixels = patches.reshape(-1, 3, side, side).permute(1, 2, 0, 3).reshape(1, 3, side, -1)
    return {f"pixel_values{suffix}": pixels, f"target_sizes{suffix}": sizes}


def _from_video(example: Example) -> torch.Tensor:
    """(n,) whether an item comes from a video."""
    given = example.from_video
    return torch.zeros(len(example.tgt_sizes), dtype=torch.bool) if given is None else given


def _typed(examples: Sequence[Example], places: Sequence[Place], shape: tuple[int, int]) -> Tensors:
    """As packed, and mm_token_type_ids, from which the model computes position ids."""
    types = torch.zeros(shape, dtype=torch.int64)
    for example, (row, start) in zip(examples, places, strict=True):
        for (first, last), is_video in zip(example.image_bound.tolist(), _from_video(example).tolist(), strict=True):
            types[row, start + first : start + last] = 2 if is_video else 1
    return {"mm_token_type_ids": types, **_packed(examples, places, shape)}


COLLATION: dict[str, Callable[[Sequence[Example], Sequence[Place], tuple[int, int]], Tensors]] = {
    "patches": _bounded,
    "packed": _packed,
    "canvas": _typed,
    "packed_print": _packed,
}
"""By the format of the pixel inputs, a key of ``finetune.encoding.pixel_inputs.INPUTS``: the batch entries besides
input_ids, attention_mask and labels, from the examples, the (batch row, first position) of each and the shape (B,T)."""
