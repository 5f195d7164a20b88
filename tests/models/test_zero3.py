"""ZeRO-3 on two ranks with different numbers and sizes of images trains like one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from side_by_side import Command, ranks, run_all
from transformers import AutoModel
from visual_batch import small_model
from zero3_worker import FAMILIES

WORKER = Path(__file__).with_name("zero3_worker.py")


def test_zero3_equals_one_process(tmp_path: Path, forked_python: str) -> None:
    words = {name: [forked_python, str(WORKER), "--out", str(tmp_path / name)] for name in ("zero3", "alone")}
    for name in words:
        (tmp_path / name).mkdir()
    run_all(*ranks(words["zero3"]), Command(words["alone"]))
    results = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in words}
    for family in FAMILIES:
        ours, reference = results["zero3"][family], results["alone"][family]
        base = small_model(family).state_dict()
        assert ours["partitioned"] == len(base)
        assert reference["partitioned"] == 0
        assert len(ours["history"]) == 4
        for step, expected in zip(ours["history"], reference["history"], strict=True):
            assert step == pytest.approx(expected, rel=2e-5)
        assert ours["eval_loss"] > 0
        saved, alone = (AutoModel.from_pretrained(tmp_path / name / family).state_dict() for name in words)
        for name in base:
            assert torch.allclose(saved[name], alone[name], atol=2e-4), name
        assert not torch.equal(saved["resampler.query"], base["resampler.query"])
