"""A batch on its way from a loader process."""

import copy
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # noqa: F401 - teaches the pickler of processes to share tensors
from torch.utils.data import DataLoader

from finetune.encoding.collate import Batch


def made(rows: int = 3) -> Batch:
    return Batch(
        input_ids=torch.arange(12).reshape(3, 4),
        patches=torch.arange(rows * 588, dtype=torch.uint8).reshape(rows, 588),
        image_bound=torch.zeros(0, 3, dtype=torch.int64),
        turned=torch.arange(6.0).reshape(2, 3).T,
        max_length_q=4,
        sources=["a", "b"],
    )


def assert_same(one: Batch, other: Batch) -> None:
    assert isinstance(one, Batch)
    assert list(one) == list(other)
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(one[name], value)
            assert one[name].dtype == value.dtype
        else:
            assert one[name] == value


def test_a_loader_gives_what_was_made() -> None:
    """Small tensors and one of more than half a megabyte."""
    sizes: Any = [1000]
    (found,) = DataLoader(sizes, batch_size=1, num_workers=1, collate_fn=lambda sizes: made(sizes[0]))
    assert_same(found, made(1000))
    found["input_ids"] += 1
    found["patches"] += 1


def test_a_copy_is_a_batch() -> None:
    """As the thread makes one that pins memory."""
    batch = made(1000)
    copied = copy.copy(batch)
    assert_same(copied, batch)
    assert copied is not batch


def test_small_tensors_need_no_shared_memory() -> None:
    """What shares it is sent as a handle; the others as they are."""
    small, large = bytes(ForkingPickler.dumps(made(10))), bytes(ForkingPickler.dumps(made(1000)))
    assert b"rebuild_storage" not in small
    assert large.count(b"rebuild_storage") == 1
    assert len(large) < 10_000
