"""The example from published files to the score table, as short as it gets."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_from_files_to_scores(tiny, tmp_path, forked_python):
    environment = {
        **os.environ,
        "OUT": str(tmp_path / "an out"),
        "MODEL": str(tiny("llama3_v2_5")),
        "METHODS": "lora",
        "TASKS": "web-single",
        "GPUS_PER_NODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHON": forked_python,
    }
    flags = ["--max_steps", "1", "--save_strategy", "no", "--dataloader_num_workers", "0", "--check", "off"]
    flags += ["--verify_adapter", "off", "--gradient_checkpointing", "false", "--gradient_accumulation_steps", "1"]
    done = subprocess.run(
        ["sh", str(ROOT / "examples/guicourse/run.sh"), *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train.json: 96 records" in done.stdout
    assert "== lora: web-single" in done.stdout
    assert "step_success" in done.stdout
    scores = json.loads((tmp_path / "an out/answers-lora-web-single/scores.json").read_text())
    assert (scores["samples"], scores["missing"]) == (4, 0)
