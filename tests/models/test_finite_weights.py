"""Non-finite values are found in loaded models, in ZeRO-3 shards and in files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.models import finite_weights
from finetune.models.finite_weights import check_file, check_finite_model, check_types
from finetune.utils.errors import CheckpointError

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 33, 100_003])
def test_one_value_is_enough(kind: torch.dtype, value: float, size: int) -> None:
    for place in (0, size // 2, size - 1):
        tensor = torch.ones(size, dtype=kind)
        assert finite_weights.finite(tensor)
        tensor[place] = value
        assert not finite_weights.finite(tensor)


def test_what_has_no_values_here() -> None:
    assert finite_weights.finite(torch.empty(0))
    assert finite_weights.finite(torch.empty(3, device="meta"))
    assert finite_weights.finite(torch.zeros(3, dtype=torch.uint8))


def partitioned(value: float) -> nn.Module:
    """As ZeRO-3 leaves a parameter: nothing in it, and this rank's part beside it."""
    model = nn.Linear(2, 2)
    weight: Any = model.weight
    weight.data = torch.empty(0)
    weight.ds_tensor = torch.tensor([1.0, value])
    return model


def test_a_part_of_a_partitioned_weight() -> None:
    check_finite_model(partitioned(1.0), "folder", [])
    with pytest.raises(CheckpointError, match=r"folder: weight has values that are not finite"):
        check_finite_model(partitioned(math.nan), "folder", [])


def test_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank has found something: this one stops too, with its name."""

    class Other:
        is_initialized = staticmethod(lambda: True)
        get_world_size = staticmethod(lambda: 2)

        @staticmethod
        def all_gather_object(found: list[Any], mine: list[str]) -> None:
            found[:] = [mine, ["llm.x"]]

    monkeypatch.setattr(finite_weights, "dist", Other)
    with pytest.raises(CheckpointError, match=r"folder: llm\.x has values"):
        check_finite_model(partitioned(1.0), "folder", [])
    check_finite_model(nn.Linear(2, 2), "folder", [])  # whole on every rank: each sees all of it


def test_a_network_in_4_bit_is_checked_by_its_files(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.tensor([1.0, math.inf])}, path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: weight has values that are not finite"):
        check_finite_model(model, "folder", [path])


def test_types_and_counters(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    counters = {"vpm.embeddings.position_ids": torch.arange(4), "tts.codes": torch.arange(4)}
    save_file({"weight": torch.ones(2, dtype=torch.bfloat16), **counters}, path)
    check_types(path, ("tts.",))
    check_file(path)
    with pytest.raises(CheckpointError, match=r"tts\.codes is of type I64; weights are floating point"):
        check_types(path)
