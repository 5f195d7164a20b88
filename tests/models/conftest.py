"""Fixtures of the model tests: small recorded models, few threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from visual_batch import FAMILIES, small_model

from finetune.models import MiniCPMV


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> MiniCPMV:
    """A fresh small model in evaluation mode, every parameter trainable; runs the test once per family."""
    return small_model(request.param)
