"""Batches from dataloader workers: their values, and the shared memory that they come in."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from finetune.encoding.collate import Batch

LARGE = 1 << 19


class Numbered(Dataset[Any]):
    """Batches whose values tell their number."""

    def __init__(self, count: int, growth: int = 0) -> None:
        self.count, self.growth = count, growth

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        rows = LARGE + self.growth * index
        return Batch(
            input_ids=torch.full((1, 7), index),
            patches=torch.full((rows, 3), index % 256, dtype=torch.uint8)[:, :2],
            labels=torch.full((1, 7), -index),
            audio_features=torch.full((3, LARGE // 2 + 1), index / 8),
            sources=[f"record {index}"],
        )


def loader(count: int, workers: int = 1, growth: int = 0, *, persistent: bool = False) -> DataLoader[Any]:
    return DataLoader(
        Numbered(count, growth), batch_size=None, num_workers=workers, persistent_workers=persistent, shuffle=False
    )


def check(batch: Any, index: int, growth: int = 0) -> None:
    assert isinstance(batch, Batch)
    assert list(batch) == ["input_ids", "patches", "labels", "audio_features", "sources"]
    assert batch["input_ids"].tolist() == [[index] * 7]
    assert batch["labels"].tolist() == [[-index] * 7]
    assert batch["sources"] == [f"record {index}"]
    assert (batch["patches"].dtype, batch["patches"].shape) == (torch.uint8, (LARGE + growth * index, 2))
    assert (batch["audio_features"].dtype, batch["audio_features"].shape) == (torch.float32, (3, LARGE // 2 + 1))
    assert (batch["patches"] == index % 256).all()
    assert (batch["audio_features"] == index / 8).all()


def test_values_and_memory_that_is_used_again() -> None:
    places = set()
    for index, batch in enumerate(loader(40)):
        check(batch, index)
        places.add(batch["patches"].data_ptr())
        del batch
    assert len(places) <= 6


def test_a_batch_that_is_kept_is_not_overwritten() -> None:
    """Nor is one of which a view, an array or a graph is left; nor are more of them than there are blocks."""
    kept, views, arrays, graphs = {}, {}, {}, {}
    weight = torch.ones(2, requires_grad=True)
    for index, batch in enumerate(loader(120)):
        check(batch, index)
        if index < 45:
            kept[index] = batch
        elif index < 50:
            views[index] = batch["audio_features"][1:2, ::1000]
        elif index < 55:
            arrays[index] = batch["patches"].numpy()[5:9]
        elif index < 60:
            graphs[index] = (weight * batch["audio_features"][:2, :2]).sum()
        del batch
    for index, batch in kept.items():
        check(batch, index)
    assert all((view == index / 8).all() for index, view in views.items())
    assert all((array == index % 256).all() for index, array in arrays.items())
    for index, graph in graphs.items():
        weight.grad = None
        graph.backward()
        assert weight.grad is not None
        assert weight.grad.tolist() == [index / 4] * 2


def test_batches_that_grow() -> None:
    for index, batch in enumerate(loader(30, growth=LARGE // 4)):
        check(batch, index, LARGE // 4)


def test_workers_that_come_and_go() -> None:
    """Of those that ended no memory stays."""
    lasting = loader(12, 2, persistent=True)
    held = []
    for _ in range(4):
        for index, (batch, other) in enumerate(zip(loader(12, 2), lasting, strict=True)):
            check(batch, index)
            check(other, index)
        held.append(Path("/proc/self/maps").read_text(encoding="utf-8").count("/torch_"))
    assert held[3] <= held[1] + 4, held


def test_outside_of_a_worker() -> None:
    batch = Numbered(5)[3]
    for copied in (pickle.loads(pickle.dumps(batch)), pickle.loads(ForkingPickler.dumps(batch)), copy.deepcopy(batch)):
        check(copied, 3)
