"""ZeRO-3 on two ranks with different numbers and sizes of images trains like one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from visual_batch import small_model
from zero3_worker import FAMILIES

WORKER = Path(__file__).with_name("zero3_worker.py")


def test_zero3_equals_one_process(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    commands = {"zero3": [*torchrun, str(WORKER)], "alone": [sys.executable, str(WORKER)]}
    runs = {}
    for name, command in commands.items():
        out = tmp_path / name
        out.mkdir()
        runs[name] = subprocess.Popen(
            [*command, "--out", str(out)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    results = {}
    try:
        for name, run in runs.items():
            output, _ = run.communicate(timeout=240)
            assert run.returncode == 0, f"{name}: {output[-4000:]}"
            results[name] = json.loads((tmp_path / name / "results.json").read_text())
    finally:
        for run in runs.values():
            run.terminate()  # torchrun passes it on to its ranks
    for family in FAMILIES:
        ours, reference = results["zero3"][family], results["alone"][family]
        base = small_model(family).state_dict()
        assert ours["partitioned"] == len(base)
        assert reference["partitioned"] == 0
        assert len(ours["history"]) == 4
        for step, expected in zip(ours["history"], reference["history"], strict=True):
            assert step == pytest.approx(expected, rel=2e-5)
        assert ours["eval_loss"] > 0
        saved, alone = (AutoModel.from_pretrained(tmp_path / name / family).state_dict() for name in commands)
        for name in base:
            assert torch.allclose(saved[name], alone[name], atol=2e-4), name
        assert not torch.equal(saved["resampler.query"], base["resampler.query"])
