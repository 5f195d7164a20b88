"""Warnings of other libraries: those that a user cannot act on are dropped, all others are shown."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from finetune.utils.errors import silence_unactionable_warnings

MISMATCH = "Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1, DeepSpeed config has 8."
FALLBACK = "`causal_conv1d_fn` is falling back to its reference PyTorch implementation because ..."


@pytest.mark.parametrize(
    ("name", "message", "shown"),
    [
        ("accelerate.accelerator", MISMATCH, False),
        ("accelerate.accelerator", f"[RANK 0] {MISMATCH}", False),
        ("accelerate.accelerator", MISMATCH.replace("has 1,", "has 4,"), True),
        ("accelerate.accelerator", "another warning", True),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: x", False),
        ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens that differ ...", False),
        ("transformers.integrations.hub_kernels", "another warning", True),
        ("somewhere.else", MISMATCH, True),
    ],
)
def test_log_messages(name, message, shown):
    silence_unactionable_warnings()
    record = logging.LogRecord(name, logging.WARNING, __file__, 1, message, None, None)
    assert bool(logging.getLogger(name).filter(record)) == shown


@pytest.mark.parametrize(("gpu", "rank", "shown"), [(True, "0", True), (True, "1", False), (False, "0", False)])
def test_missing_kernels_are_reported_once_and_only_beside_a_gpu(monkeypatch, gpu, rank, shown):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("RANK", rank)
    silence_unactionable_warnings()
    name = "transformers.integrations.hub_kernels"
    record = logging.LogRecord(name, logging.WARNING, __file__, 1, FALLBACK, None, None)
    assert bool(logging.getLogger(name).filter(record)) == shown


def test_python_warnings():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        silence_unactionable_warnings()
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("The 'repr' attribute with value False was provided to the `Field()` function", stacklevel=1)
        warnings.warn("something a user can act on", stacklevel=1)
    assert [str(each.message) for each in found] == ["something a user can act on"]


def test_filters_are_added_once():
    silence_unactionable_warnings()
    before = len(logging.getLogger("accelerate.accelerator").filters)
    silence_unactionable_warnings()
    assert len(logging.getLogger("accelerate.accelerator").filters) == before
