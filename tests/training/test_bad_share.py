"""--max_bad_share: a run that skips too many samples stops with its own exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune.arguments.data import DataArguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.data_check.check_records import check_before_training
from finetune.encoding.encoder import Encoder
from finetune.encoding.sample_policy import BAD_SAMPLES, SamplePolicy
from finetune.models import load_tokenizer
from finetune.readers import read
from finetune.runtime.outcome import UNUSABLE_RESULT
from finetune.training.bad_share import BadShareCallback
from finetune.utils.errors import ArgumentError, UnusableResultError


@pytest.fixture(scope="module")
def encoder(tiny: Callable[[str], Path]) -> Encoder:
    checkpoint = resolve_base(str(tiny("v2_0")))
    return Encoder(checkpoint.family, load_tokenizer(tiny("v2_0")), checkpoint.config, max_length=60)


def make(folder: Path, encoder: Encoder, good: int, bad: int, long: int = 0, **options: Any) -> SamplePolicy:
    """Taken once, with numbers of records that are good, bad and too long."""
    answers = ["A dog."] * good + [""] * bad + ["A dog. " * 100] * long
    turns = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}] for answer in answers]
    path = folder / "data.json"
    path.write_text(json.dumps([{"id": str(place), "conversations": each} for place, each in enumerate(turns)]))
    options = {"on_bad_sample": "skip", "overlong": "drop", "max_bad_share": 0.1, **options}
    sample_policy = SamplePolicy(read(path), encoder, report=folder / BAD_SAMPLES, **options)
    for index in range(len(turns)):
        sample_policy.example(index)
    return sample_policy


def judge(sample_policy: SamplePolicy, folder: Path, event: str = "on_step_end", step: int = 10) -> None:
    args: Any = SimpleNamespace(output_dir=str(folder), device=torch.device("cpu"))
    state: Any = SimpleNamespace(global_step=step)
    getattr(BadShareCallback(sample_policy), event)(args, state, None)


def test_more_than_the_share_stops(tmp_path: Path, encoder: Encoder) -> None:
    judge(make(tmp_path, encoder, 45, 5), tmp_path)
    sample_policy = make(tmp_path, encoder, 44, 6)
    judge(sample_policy, tmp_path, step=9)
    with pytest.raises(
        UnusableResultError, match=r"6 of 50 samples .* --max_bad_share 0.1 .*record 49 \(id '49'\)"
    ) as caught:
        judge(sample_policy, tmp_path)
    assert caught.value.exit_code == UNUSABLE_RESULT
    judge(make(tmp_path, encoder, 44, 6, max_bad_share=1.0), tmp_path)


def test_few_samples_are_judged_at_the_end(tmp_path: Path, encoder: Encoder) -> None:
    sample_policy = make(tmp_path, encoder, 3, 18)
    judge(sample_policy, tmp_path)
    with pytest.raises(UnusableResultError, match="18 of 21 samples"):
        judge(sample_policy, tmp_path, "on_train_end")


def test_what_is_only_too_long_does_not_count(tmp_path: Path, encoder: Encoder) -> None:
    sample_policy = make(tmp_path, encoder, 20, 2, 40)
    assert sample_policy.totals() == (62, 2)
    assert sample_policy.counts()[-1] == 42
    judge(sample_policy, tmp_path)
    judge(sample_policy, tmp_path, "on_train_end")


def test_what_the_check_finds_stops_before_the_first_step(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(
        UnusableResultError, match="2 of 12 records cannot be used, more than --max_bad_share 0.1 allows"
    ):
        check_before_training([make(tmp_path, encoder, 10, 2)], "full")
    check_before_training([make(tmp_path, encoder, 10, 1)], "full")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ArgumentError, match="--max_bad_share"):
        DataArguments(max_bad_share=share)
