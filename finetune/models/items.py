"""The visual part of a batch, checked: which patches make an item and where its features go."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """The n visual items of a micro-batch.

    Attributes:
        patches: (N, 3*P*P) uint8, all items one behind another.
        sizes: rows and columns of patches per item.
        rows: (n,) batch row of each item.
        starts: (n,) first placeholder of each item.
    """

    patches: torch.Tensor
    sizes: list[tuple[int, int]]
    rows: torch.Tensor
    starts: torch.Tensor


def dummy_patches(width: int, device: torch.device) -> torch.Tensor:
    """A grey picture of 2 x 2 patches, (4, width) uint8, for batches without images."""
    return torch.full((4, width), 127, dtype=torch.uint8, device=device)


def check_patches(patches: torch.Tensor, sizes: list[tuple[int, int]], width: int) -> None:
    """Checks that patches and sizes belong together.

    Raises:
        ValueError: wrong type or width, or another number of patches than the sizes add up to.
    """
    if patches.dtype != torch.uint8:
        raise ValueError(f"patches must be uint8 pixel values, got {patches.dtype}; the network normalises them itself")
    if patches.ndim != 2 or patches.shape[1] != width:
        raise ValueError(f"patches must be (N, {width}), got {tuple(patches.shape)}: check patch_size in config.json")
    if any(height < 1 or columns < 1 for height, columns in sizes):
        raise ValueError(f"tgt_sizes must be positive, got {sizes}")
    expected = sum(height * columns for height, columns in sizes)
    if expected != len(patches):
        raise ValueError(f"tgt_sizes add up to {expected} patches, but {len(patches)} were given")


def check_bounds(bounds: list[list[int]], items: int, queries: int, shape: tuple[int, int]) -> None:
    """Checks that there is one run of placeholders of the right length per item, inside the batch.

    Args:
        bounds: batch row, start and end of each run.
        items: number of visual items.
        queries: placeholders per item.
        shape: rows and length of the batch.

    Raises:
        ValueError: naming the two numbers that disagree.
    """
    if len(bounds) != items:
        raise ValueError(f"{items} visual items, but image_bound has {len(bounds)} rows: one run of placeholders each")
    for index, (row, start, end) in enumerate(bounds):
        if end - start != queries:
            raise ValueError(f"visual item {index} needs {queries} placeholders, but its image_bound has {end - start}")
        if not (0 <= row < shape[0] and start >= 0 and end <= shape[1]):
            raise ValueError(
                f"image_bound of visual item {index} is row {row}, {start} to {end}, but the batch has {shape[0]} rows "
                f"of {shape[1]} tokens"
            )


def check_temporal(temporal_ids: list[int] | None, items: int) -> None:
    """Checks the time indices of a network that has no temporal positions.

    Raises:
        ValueError: another number of ids than items, or a packed video frame.
    """
    if temporal_ids is None:
        return
    if len(temporal_ids) != items:
        raise ValueError(f"{items} visual items, but {len(temporal_ids)} temporal_ids")
    if packed := [value for value in temporal_ids if value != -1]:
        raise ValueError(
            f"temporal_ids has {packed[0]}, but this model has no temporal positions: every id must be -1 (give video "
            "frames as single images)"
        )


def read_items(
    patches: torch.Tensor | None,
    tgt_sizes: torch.Tensor | None,
    image_bound: torch.Tensor | None,
    temporal_ids: torch.Tensor | None,
    *,
    queries: int,
    width: int,
    shape: tuple[int, int],
) -> Items | None:
    """The visual items of a batch, or None when it has none.

    Args:
        patches: (N, 3*P*P) uint8.
        tgt_sizes: (n, 2) rows, columns.
        image_bound: (n, 3) batch row, start, end (half open).
        temporal_ids: (n,), -1 for stills.
        queries: placeholders per item.
        width: 3*P*P.
        shape: rows and length of the batch.

    Raises:
        ValueError: the parts do not agree.
    """
    if patches is None or tgt_sizes is None or image_bound is None:
        given = {"patches": patches, "tgt_sizes": tgt_sizes, "image_bound": image_bound}
        missing = [name for name, tensor in given.items() if tensor is None]
        present = [name for name, tensor in given.items() if tensor is not None and len(tensor)]
        if present:
            raise ValueError(f"{' and '.join(present)} given without {' and '.join(missing)}")
        return None
    sizes = [(height, columns) for height, columns in tgt_sizes.tolist()]
    check_bounds(image_bound.tolist(), len(sizes), queries, shape)
    check_temporal(None if temporal_ids is None else temporal_ids.tolist(), len(sizes))
    check_patches(patches, sizes, width)
    if not sizes:
        return None
    return Items(patches=patches, sizes=sizes, rows=image_bound[:, 0], starts=image_bound[:, 1])


def merge(embeddings: torch.Tensor, features: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Text embeddings (B, T, E) with the features (n, Q, E) of each item in place of its placeholders.

    Out of place: the embeddings may be a leaf that requires a gradient (adapters with checkpointing).
    """
    rows, starts = rows.to(embeddings.device), starts.to(embeddings.device)
    columns = starts[:, None] + torch.arange(features.shape[1], device=embeddings.device)
    features = features.to(device=embeddings.device, dtype=embeddings.dtype)
    return embeddings.index_put((rows[:, None].expand_as(columns), columns), features)
