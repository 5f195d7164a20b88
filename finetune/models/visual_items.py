"""Visual inputs of a batch: checks patches, sizes and placeholders, and inserts features into text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualItems:
    """The n visual items of a micro-batch, in g groups of consecutive items.

    Attributes:
        patches: (N, 3*P*P) uint8, all items concatenated.
        sizes: rows and columns of patches per item.
        times: time index per item, -1 for stills.
        groups: number of items per group; they sum to n. A group has one run of placeholders.
    """

    patches: torch.Tensor
    sizes: list[tuple[int, int]]
    times: list[int]
    groups: list[int]


def dummy_items(width: int, device: torch.device) -> VisualItems:
    """A grey dummy image of 2 x 2 patches, (4, width) uint8, for batches without images."""
    patches = torch.full((4, width), 127, dtype=torch.uint8, device=device)
    return VisualItems(patches=patches, sizes=[(2, 2)], times=[-1], groups=[1])


def read_items(
    patches: torch.Tensor,
    tgt_sizes: torch.Tensor,
    temporal_ids: torch.Tensor | None,
    group_sizes: torch.Tensor | None,
    *,
    width: int,
    temporal: bool,
) -> VisualItems:
    """The visual items of a batch, possibly none.

    Args:
        patches: (N, 3*P*P) uint8.
        tgt_sizes: (n, 2) rows, columns.
        temporal_ids: (n,), -1 for stills; None for stills only.
        group_sizes: (g,) number of items per group; None if every item is a group.
        width: 3*P*P.
        temporal: whether the model has temporal positions.

    Raises:
        ValueError: the inputs do not match, or the model does not support packed frames.
    """
    sizes = [(height, columns) for height, columns in tgt_sizes.tolist()]
    times = [-1] * len(sizes) if temporal_ids is None else temporal_ids.tolist()
    groups = [1] * len(sizes) if group_sizes is None else group_sizes.tolist()
    if len(times) != len(sizes):
        raise ValueError(f"{len(sizes)} visual items, but {len(times)} temporal_ids")
    if any(count < 1 for count in groups) or sum(groups) != len(sizes):
        raise ValueError(f"group_sizes {groups} must be positive and add up to the {len(sizes)} visual items")
    if wrong := [time for time in times if time < -1]:
        raise ValueError(f"temporal_ids has {wrong[0]}: a time index is 0 or more, -1 marks a still")
    if not temporal:
        _refuse_packing(times, groups)
    _check_patches(patches, sizes, width)
    return VisualItems(patches=patches, sizes=sizes, times=times, groups=groups)


def split_items(items: VisualItems, counts: Sequence[int]) -> list[VisualItems]:
    """Splits items into chunks.

    Args:
        items: n items in g groups.
        counts: groups per chunk; they sum to g.
    """
    chunks, group, item, patch = [], 0, 0, 0
    for count in counts:
        groups = items.groups[group : group + count]
        sizes = items.sizes[item : item + sum(groups)]
        length = sum(height * columns for height, columns in sizes)
        times = items.times[item : item + len(sizes)]
        chunks.append(
            VisualItems(patches=items.patches[patch : patch + length], sizes=sizes, times=times, groups=groups)
        )
        group, item, patch = group + count, item + len(sizes), patch + length
    return chunks


def _refuse_packing(times: list[int], groups: list[int]) -> None:
    if packed := [time for time in times if time != -1]:
        raise ValueError(
            f"temporal_ids has {packed[0]}, but this model has no temporal positions: every id must be -1 (give video "
            "frames as single images)"
        )
    if packed := [count for count in groups if count != 1]:
        raise ValueError(
            f"group_sizes has {packed[0]}, but this model has no temporal positions: every item is a group of its own"
        )


def _check_patches(patches: torch.Tensor, sizes: list[tuple[int, int]], width: int) -> None:
    if patches.dtype != torch.uint8:
        raise ValueError(f"patches must be uint8 pixel values, got {patches.dtype}; the model normalises them")
    if patches.ndim != 2 or patches.shape[1] != width:
        raise ValueError(f"patches must be (N, {width}), got {tuple(patches.shape)}: check patch_size in config.json")
    if any(height < 1 or columns < 1 for height, columns in sizes):
        raise ValueError(f"tgt_sizes must be positive, got {sizes}")
    expected = sum(height * columns for height, columns in sizes)
    if expected != len(patches):
        raise ValueError(f"tgt_sizes add up to {expected} patches, but {len(patches)} were given")


def given_together(**tensors: torch.Tensor | None) -> bool:
    """Whether all of these inputs are given.

    Raises:
        ValueError: some are given and not empty, and others are not given.
    """
    missing = [name for name, tensor in tensors.items() if tensor is None]
    present = [name for name, tensor in tensors.items() if tensor is not None and len(tensor)]
    if missing and present:
        raise ValueError(f"{' and '.join(present)} given without {' and '.join(missing)}")
    return not missing


def check_bounds(bounds: list[list[int]], groups: int, queries: int, embeddings: torch.Tensor) -> None:
    """Checks that every group of items has one run of placeholders of the right length, inside the batch.

    Args:
        bounds: batch row, start and end of each run.
        groups: number of groups (of visual items, where none are packed).
        queries: placeholders per group.
        embeddings: (B, T, E).

    Raises:
        ValueError: naming the two numbers that disagree.
    """
    if len(bounds) != groups:
        raise ValueError(f"{groups} visual items, but image_bound has {len(bounds)} rows: one run of placeholders each")
    for index, (_, start, end) in enumerate(bounds):
        if end - start != queries:
            raise ValueError(f"visual item {index} needs {queries} placeholders, but its image_bound has {end - start}")
    check_inside(bounds, "image_bound", embeddings)


def check_inside(bounds: list[list[int]], name: str, embeddings: torch.Tensor) -> None:
    """Checks that every run of placeholders lies inside the batch.

    Raises:
        ValueError: naming the first that does not.
    """
    rows, length = embeddings.shape[:2]
    for index, (row, start, end) in enumerate(bounds):
        if not (0 <= row < rows and 0 <= start <= end <= length):
            raise ValueError(
                f"{name} {index} is row {row}, {start} to {end}, but the batch has {rows} rows of {length} tokens"
            )


def merge(embeddings: torch.Tensor, features: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Text embeddings (B, T, E) with features (S, E) at the S placeholders of all bounds, in their order.

    Not in place: the embeddings may be a leaf that requires a gradient (adapters with checkpointing).

    Args:
        embeddings: (B, T, E).
        features: (S, E).
        bounds: (m, 3) batch row, start, end; their lengths sum to S.
    """
    device, total = embeddings.device, len(features)
    rows, starts, ends = bounds.to(device).unbind(1)
    lengths = ends - starts
    offsets = starts - (lengths.cumsum(0) - lengths)
    rows = rows.repeat_interleave(lengths, output_size=total)
    columns = offsets.repeat_interleave(lengths, output_size=total) + torch.arange(total, device=device)
    return embeddings.index_put((rows, columns), features.to(device=device, dtype=embeddings.dtype))


def repeat_bounds(bounds: torch.Tensor, times: int) -> torch.Tensor:
    """Bounds (m, 3) for ``times`` copies of every batch row; the copies of a row are adjacent."""
    copies = torch.arange(times, device=bounds.device).repeat(len(bounds))
    bounds = bounds.repeat_interleave(times, dim=0)
    return torch.cat([(bounds[:, 0] * times + copies)[:, None], bounds[:, 1:]], dim=1)
