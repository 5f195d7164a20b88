"""Small models and batches with images for the model tests."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from finetune.models import MiniCPMV, load_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAMILIES = ("v2_0", "llama3_v2_5", "v2_6", "o2_6", "v4_0", "v4_5", "o4_5")
OMNI = ("o2_6", "o4_5")
# Families of which ``tiny`` writes a checkpoint with a tokenizer.
TINY = ("v2_0", "llama3_v2_5")
VOCABULARY = 160
SIDE = 14

# Per row: the number of text tokens in front, the sizes (rows, columns) of its items, the text tokens behind.
Row = tuple[int, list[tuple[int, int]], int]


def small_model(family: str, **options) -> MiniCPMV:
    """The recorded tiny model of a family, float32."""
    folder = GOLDEN / "forward" / family
    model = load_model(folder, dtype=torch.float32, tokenizer_required=False, **options)
    assert isinstance(model, MiniCPMV)
    return model.eval()


def pixels(size: tuple[int, int], seed: int) -> torch.Tensor:
    """(rows * columns, 3*P*P) uint8 noise with a brightness of its own."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 120, (size[0] * size[1], 3 * SIDE * SIDE), generator=generator)
    return (noise + 17 * (seed % 8)).to(torch.uint8)


def make_batch(rows: list[Row], queries: int, *, side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch by the contract, padded on one side; a row is the same wherever it stands."""
    encoded = []
    for before, sizes, after in rows:
        generator = torch.Generator().manual_seed(seed + 1000 * before + after + sum(31 * h + w for h, w in sizes))
        ids, bounds = torch.randint(3, VOCABULARY, (before,), generator=generator).tolist(), []
        for _ in sizes:
            bounds.append((len(ids) + 1, len(ids) + 1 + queries))
            ids += [1, *[0] * queries, 2]
        ids += torch.randint(3, VOCABULARY, (after,), generator=generator).tolist()
        patches = [pixels(size, seed + 10 * i + before + size[0] + size[1]) for i, size in enumerate(sizes)]
        encoded.append((ids, bounds, sizes, patches, after))
    length = max(len(ids) for ids, *_ in encoded)
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    batch = {name: torch.zeros(len(rows), length, dtype=torch.int64) for name in names}
    batch["labels"] -= 100
    all_bounds, all_sizes, all_patches = [], [], []
    for row, (ids, bounds, sizes, patches, after) in enumerate(encoded):
        start = length - len(ids) if side == "left" else 0
        place = slice(start, start + len(ids))
        batch["input_ids"][row, place] = torch.tensor(ids)
        batch["attention_mask"][row, place] = 1
        batch["position_ids"][row, place] = torch.arange(len(ids))
        if after > 1:
            batch["labels"][row, start + len(ids) - after + 1 : start + len(ids)] = torch.tensor(ids[1 - after :])
        all_bounds += [[row, start + first, start + last] for first, last in bounds]
        all_sizes += [list(size) for size in sizes]
        all_patches += patches
    batch["patches"] = torch.cat([torch.zeros(0, 3 * SIDE * SIDE, dtype=torch.uint8), *all_patches])
    batch["tgt_sizes"] = torch.tensor(all_sizes, dtype=torch.int64).reshape(-1, 2)
    batch["image_bound"] = torch.tensor(all_bounds, dtype=torch.int64).reshape(-1, 3)
    batch["temporal_ids"] = torch.full((len(all_sizes),), -1, dtype=torch.int64)
    return batch


def pack_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Batches of one row each as the segments of ONE row, by the contract of packed batches."""
    lengths = [row["input_ids"].shape[1] for row in rows]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    batch: dict[str, Any] = {
        name: torch.cat([row[name] for row in rows], dim=1) for name in ("input_ids", "position_ids", "labels")
    }
    for name in ("patches", "tgt_sizes", "temporal_ids", "audio_lengths"):
        if parts := [row[name] for row in rows if name in row]:
            batch[name] = torch.cat(parts)
    for name in ("image_bound", "audio_bound"):
        shifts = [torch.tensor([0, start, start]) for start in ends[:-1].tolist()]
        if parts := [row[name] + shift for row, shift in zip(rows, shifts, strict=True) if name in row]:
            batch[name] = torch.cat(parts)
    if clips := [clip.T for row in rows if "audio_features" in row for clip in row["audio_features"]]:
        batch["audio_features"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).transpose(1, 2)
    batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    return batch | {"max_length_q": max(lengths), "max_length_k": max(lengths)}


def prompt(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``generate`` takes of a batch."""
    return {name: value for name, value in batch.items() if name not in ("labels", "position_ids")}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients that are there."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
