"""Freed memory stays with loader processes, and with them alone."""

from __future__ import annotations

import ctypes

import pytest
from torch.utils.data import DataLoader, Dataset

from finetune.media import heap


class Settled(Dataset[bool]):
    """Whether a process has settled, once it was asked to."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        heap.settle()
        return heap.keep_freed_memory.cache_info().currsize == 1 and heap.keep_freed_memory()


@pytest.mark.parametrize(("workers", "settled"), [(0, False), (1, True)])
def test_only_loader_processes_settle(workers: int, settled: bool) -> None:
    heap.keep_freed_memory.cache_clear()
    assert DataLoader(Settled(), batch_size=None, num_workers=workers).dataset[0] is False
    found = list(DataLoader(Settled(), batch_size=None, num_workers=workers))
    assert found == [settled] * 2
    assert heap.keep_freed_memory.cache_info().currsize == 0


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    heap.keep_freed_memory.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert heap.keep_freed_memory() is False
    heap.keep_freed_memory.cache_clear()
