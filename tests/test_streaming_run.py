"""Runs over streamed data: every record once per pass on two ranks, resumed where it stopped, saved and verified."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming_worker import run

import finetune as package
from finetune.arguments import ArgumentError, parse_arguments
from finetune.readers.streaming import Stream
from finetune.sample import DataError
from finetune.tuning.resume import ResumeError

WORKER = Path(__file__).with_name("streaming_worker.py")
ONE = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "0")
TEXTS = 11

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "train.jsonl"
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    path.write_text("".join(json.dumps({"id": str(n), "conversations": turns}) + "\n" for n in range(TEXTS)))
    return path


def test_two_ranks_see_every_record_once_per_pass(tiny: Tiny, lines: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--max_steps", "5", "--save_strategy", "no", "--buffer_size", "4", "--use_cpu", "true"]
    flags += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    flags += ["--dataloader_num_workers", "1", "--logging_steps", "1"]
    command = [sys.executable, str(WORKER), str(tiny("llama3_v2_5")), str(lines), str(tmp_path), *flags]
    settings = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    settings |= {"PYTHONPATH": str(WORKER.parent.parent), "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [(report["steps"], report["world"], len(report["seen"])) for report in reports] == [(5, 2, 10)] * 2
    first_pass = []
    for rank, report in enumerate(reports):
        sources = [source for batch in report["seen"] for source in batch]
        share = len(list(Stream([lines], seed=5, buffer_size=4).one_pass(0, rank, 2)))
        assert 0 < share <= len(sources), "the run is shorter than a pass"
        first_pass += sources[:share]
    assert Counter(source.rpartition("(id ")[2] for source in first_pass) == {f"'{n}')": 1 for n in range(TEXTS)}


def test_a_resumed_run_goes_on_where_it_stopped(tiny: Tiny, lines: Path, tmp_path: Path) -> None:
    saving = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", *ONE)
    whole = run(tiny("llama3_v2_5"), lines, tmp_path, *saving)
    assert (whole.state.global_step, len(whole.seen)) == (4, 8)
    half = tmp_path / "checkpoint-2"
    rest = run(tiny("llama3_v2_5"), lines, tmp_path / "rest", *saving, resume=half)
    assert rest.seen == whole.seen[4:]
    assert rest.state.epoch == whole.state.epoch
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (whole, rest)]
    assert losses[0] == losses[1]
    with pytest.raises(ResumeError, match=r"dataloader_num_workers 0 \(now 1\)"):
        run(tiny("llama3_v2_5"), lines, tmp_path / "rest", *saving[:-1], "1", resume=half)
    with pytest.raises(ResumeError, match="was streamed and this one is not"):
        run(tiny("llama3_v2_5"), lines, tmp_path / "rest", *saving, "--streaming", "false", resume=half)


def test_from_flags_to_a_verified_adapter(tiny: Tiny, demo_data: Path, tmp_path: Path) -> None:
    """Images, through the script itself; the loader has processes of its own."""
    records = json.loads((demo_data / "train.json").read_text())
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--model_name_or_path", str(tiny("llama3_v2_5")), "--data_path", str(data), "--use_lora", "true"]
    words += ["--image_root", str(demo_data), "--output_dir", str(tmp_path / "out"), "--streaming", "true"]
    words += ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--dataloader_num_workers", "1"]
    script = Path(package.__file__).resolve().parent.parent / "finetune.py"
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert '"verified": true' in done.stdout


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--val_size", "0.1"], DataError, "nothing can be kept out of a stream"),
        (["--max_samples", "5"], DataError, "--max_steps says when training ends"),
        (["--buffer_size", "0"], DataError, "at least 1 record"),
        (["--max_steps", "-1"], ArgumentError, "say with --max_steps"),
    ],
)
def test_wishes_that_a_stream_cannot_fulfil(
    lines: Path, flags: list[str], error: type[Exception], message: str
) -> None:
    from dataset import make_supervised_data_module

    words = ["--model_name_or_path", "m", "--data_path", str(lines), "--streaming", "true", "--max_steps", "1"]
    with pytest.raises(error, match=message):
        make_supervised_data_module(parse_arguments([*words, *flags]).data, None)  # pyright: ignore[reportArgumentType]
