"""The order of an epoch is accelerate's, and the trainer's loader uses it on every rank."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from test_trainer import make_trainer

from finetune.batching.samplers import CompactRandomSampler


@pytest.mark.parametrize("count", [1, 5, 10_000])
def test_order_is_the_same(count: int) -> None:
    torch.manual_seed(7)
    other = SeedableRandomSampler(range(count))
    other.set_epoch(1)
    lean = CompactRandomSampler(other)
    assert len(lean) == count
    for _ in range(2):
        assert list(lean) == list(other)
    assert lean.epoch == other.epoch == 3


def test_the_loader_uses_it(tiny: Callable[[str], Path], demo_data: Path, tmp_path: Path) -> None:
    loader = make_trainer(tiny("llama3_v2_5"), demo_data, tmp_path).get_train_dataloader()
    assert isinstance(loader.get_sampler(), CompactRandomSampler)  # pyright: ignore[reportAttributeAccessIssue]
    first, second = ([batch["sources"] for batch in loader] for _ in range(2))
    assert first != second
    assert sorted(sum(first, [])) == sorted(sum(second, []))
