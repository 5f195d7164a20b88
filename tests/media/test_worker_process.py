"""Loader processes keep freed memory and let training go first; other processes are left alone."""

from __future__ import annotations

import os

import pytest
from torch.utils.data import DataLoader, Dataset

from finetune.media import worker_process
from finetune.utils.malloc import keep_freed_memory


class Settled(Dataset[tuple[bool, int]]):
    """Whether a process keeps freed memory, and its niceness, once it was asked to settle."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[bool, int]:
        worker_process.configure_worker()
        kept = keep_freed_memory.cache_info().currsize == 1 and keep_freed_memory()
        return kept, os.getpriority(os.PRIO_PROCESS, 0)


@pytest.fixture(autouse=True)
def unsettled() -> None:
    """Loader processes start as copies of this one."""
    keep_freed_memory.cache_clear()
    worker_process.lower_worker_priority.cache_clear()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("cores", "below"), [(6, 0), (5, 10)])
def test_only_loader_processes_settle(monkeypatch: pytest.MonkeyPatch, workers: int, cores: int, below: int) -> None:
    """Two ranks with two loader processes each want six cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    here = os.getpriority(os.PRIO_PROCESS, 0)
    found = list(DataLoader(Settled(), batch_size=None, num_workers=workers))
    assert found == [[True, min(here + below, 19)] if workers else [False, here]] * 2
    assert os.getpriority(os.PRIO_PROCESS, 0) == here
    assert keep_freed_memory.cache_info().currsize == 0
