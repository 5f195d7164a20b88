"""A run of two processes of which one runs out of GPU memory: one message, its exit code, and both end."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_one_rank_of_two_runs_out_of_memory(tiny, demo_data, tmp_path, forked_python):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        "--model_name_or_path",
        str(tiny("v2_6")),
        "--data_path",
        str(demo_data / "train.json"),
        "--max_steps",
        "3",
    ]
    words += ["--use_lora", "true", "--use_cpu", "true", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    words += [
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--dataloader_num_workers",
        "0",
        "--disable_tqdm",
        "true",
    ]
    words += ["--model_max_length", "1024", "--per_device_train_batch_size", "2", "--max_slice_nums", "1"]
    options = [
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
        "--",
        str(ROOT / "tests" / "out_of_memory_worker.py"),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OUT_OF_MEMORY_RANK": "1"}
    done = subprocess.run(
        [forked_python, "-m", "finetune.launch", *options, *words],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 6, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert re.fullmatch(
        r"error: out of GPU memory on rank 1 in step 2 of 3: 3\.0 GB asked for, 1\.2 GB of 23\.6 GB free; records: "
        r"\S+train\.json, record \d+ \(id .*\); \S+train\.json, record \d+ \(id .*\)",
        said[0],
    )
    # 25 GB for a model that has a millionth of it: no flag of such a run is said to fit.
    assert said[1].startswith("  flags that save most, but nothing is estimated to fit (estimated for 2 x ")
    assert said[-1] == "  add --resume_from_checkpoint auto to continue from checkpoint-1"
    assert len(said) == 6, "nothing is printed after it"
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("result="))
    assert (result["status"], result["exit_code"]) == ("error", 6)
    assert result["message"].splitlines()[0] == said[0].removeprefix("error: ")
