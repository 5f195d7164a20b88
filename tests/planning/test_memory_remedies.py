"""Flags for a step that ran out of memory: the cheapest that fit, computed with the estimate of plan."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_network import SMALL

from finetune.arguments.parse import Arguments, parse_arguments
from finetune.checkpoints.manifest import describe, write
from finetune.planning.memory_estimate import MemoryEstimator
from finetune.planning.memory_remedies import changes_of, remedies
from finetune.planning.out_of_memory_report import OutOfMemoryReport
from finetune.planning.training_setup import SampleShape, TrainingSetup
from finetune.runtime import out_of_memory
from finetune.runtime.out_of_memory import GIB, Allocation, OutOfMemoryError, is_out_of_memory
from finetune.runtime.processes import RUN_FOLDER
from finetune.utils.errors import ArgumentError

EVALUATION = ("--eval_generate", "4", "--eval_data_path", "e")
PARTS = ("llm", "vision", "resampler")
SHAPE = SampleShape(batch=4, tokens=512, items=4, patches=64)
MESSAGE = (
    "CUDA out of memory. Tried to allocate {asked} GiB. GPU 0 has a total capacity of {capacity} GiB of which 352.00 "
    "MiB is free. Process 77 has 4.00 GiB memory in use. Including non-PyTorch memory, this process has {own} GiB "
    "memory in use. Of the allocated memory 1.10 GiB is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def arguments(output: Path, *flags: str) -> Arguments:
    words = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(output), "--report_to", "none"]
    words += ["--use_cpu", "true", "--per_device_train_batch_size", "4", "--model_max_length", "512", *flags]
    return parse_arguments(words)


def error(asked: float = 2.0, capacity: float = 12.0, own: float = 7.66) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(MESSAGE.format(asked=f"{asked:.2f}", capacity=f"{capacity:.2f}", own=f"{own:.2f}"))


def test_figures_of_the_message():
    found = Allocation.of(error())
    assert (found.asked, found.capacity, found.free) == (2 * GIB, 12 * GIB, 352 * 2**20)
    assert found.available == pytest.approx(8 * GIB, rel=0.01)
    assert found.others == pytest.approx(4 * GIB, rel=0.01)
    assert str(found) == "2.0 GB asked for, 0.34 GB of 12.0 GB free, 4.0 GB in use by other processes"
    assert (found.fragmented, Allocation.of(error(asked=1.0)).fragmented) == (False, True)
    assert str(Allocation.of(RuntimeError("CUDA error: out of memory"))) == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (error(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("CUDA out of memory"), False),
    ],
)
def test_only_errors_of_gpu_memory_are_taken(given, expected):
    assert is_out_of_memory(given) is expected


def test_the_cheapest_that_fit_come_first_and_none_contains_an_earlier_one(tmp_path):
    training = arguments(tmp_path, "--use_lora", "true").training
    setup, estimator = TrainingSetup(checkpointing=False, gpus=2), MemoryEstimator(SMALL)
    changes = changes_of(training, setup, SHAPE, PARTS)
    flags = [change.flags for change in changes]
    order = (
        "--vision_batch",
        "--per_device",
        "--gradient_checkpointing",
        "zero2.json",
        "zero3.json",
        "_offload",
        "--q_lora",
    )
    places = [
        next(place for place, flag in enumerate(flags) if word in flag) for word in (*order, "--model_max_length")
    ]
    assert places == sorted(places)
    now = estimator.memory(setup, SHAPE).total
    batch = estimator.memory(replace(setup, accumulation=4), replace(SHAPE, batch=1)).total
    found, fits = remedies(estimator.memory, changes, setup, SHAPE, batch)
    assert fits
    assert all(remedy.memory.total <= batch < now for remedy in found)
    assert found[0].flags == "--per_device_train_batch_size 1 --gradient_accumulation_steps 4"
    assert found[0].resumes
    assert len(found) == 3
    assert len({remedy.flags for remedy in found}) == 3


def test_what_saves_most_where_nothing_fits(tmp_path):
    training = arguments(tmp_path, "--use_lora", "true").training
    setup, estimator = TrainingSetup(), MemoryEstimator(SMALL)
    found, fits = remedies(estimator.memory, changes_of(training, setup, SHAPE, PARTS), setup, SHAPE, 1)
    assert not fits
    totals = [remedy.memory.total for remedy in found]
    assert totals == sorted(totals)
    assert 1 < totals[0] < totals[-1] < estimator.memory(setup, SHAPE).total
    assert not all(remedy.resumes for remedy in found)


@pytest.mark.parametrize(
    ("flags", "setup", "absent"),
    [
        (
            ("--use_lora", "true", "--vision_batch", "8"),
            TrainingSetup(vision_batch=8),
            ["--vision_batch", "zero2.json"],
        ),
        ((), TrainingSetup(method="full", stage=3, offload=True, gpus=8), ["--q_lora", "--deepspeed"]),
        (("--per_device_train_batch_size", "1"), TrainingSetup(method="full"), ["--per_device", "--checkpoint_parts"]),
        (("--packing", "best_fit"), TrainingSetup(method="full"), ["--per_device"]),
    ],
)
def test_flags_without_effect_are_not_named(tmp_path, flags, setup, absent):
    training = arguments(tmp_path, *flags).training
    named = " ".join(change.flags for change in changes_of(training, setup, replace(SHAPE, items=20), PARTS))
    assert named
    assert not [flag for flag in absent if flag in named]


def test_a_row_of_packed_samples_gets_shorter(tmp_path):
    training = arguments(tmp_path, "--packing", "best_fit").training
    setup, row = TrainingSetup(method="full"), replace(SHAPE, batch=1, tokens=2048, items=16)
    change = next(each for each in changes_of(training, setup, row, PARTS) if each.kind == "batch")
    assert change.flags == "--packing_tokens 1024 --gradient_accumulation_steps 2"
    after, shape = change.apply(setup, row)
    assert (after.accumulation, shape.tokens, shape.items) == (2, 1024, 8)


def report(args: Arguments, shape: Any = SHAPE, *, step: int | None = None, training: bool = True) -> str:
    """What is said of an error of 0.5 GB that has 2 GB."""
    measured: Any = shape if callable(shape) else lambda: shape
    made = OutOfMemoryReport(SMALL, args.training, args.lora, measured)
    if step is not None:
        records = SimpleNamespace(current=lambda: [f"train.json, record {number}" for number in range(9)])
        state = SimpleNamespace(global_step=step, max_steps=20)
        made.watch(SimpleNamespace(model=SimpleNamespace(training=training), state=state, checks=records))
    with pytest.raises(OutOfMemoryError) as raised, made:
        raise error(asked=0.5, capacity=2, own=1.66)
    assert raised.value.exit_code == 6
    return str(raised.value)


def test_the_message(tmp_path):
    said = report(arguments(tmp_path, "--use_lora", "true"), step=6).splitlines()
    assert said[0].startswith("out of GPU memory on rank 0 in step 7 of 20: 0.5 GB asked for, 0.34 GB of 2.0 GB free; ")
    named = "; ".join(f"train.json, record {number}" for number in range(8))
    assert said[0].endswith(f"; records: {named} and 1 more")
    assert said[1].startswith(
        "  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment: torch held 1.5 GB"
    )
    assert said[2].startswith("  flags that fit, the cheapest first (estimated for 4 x 512 tokens on a GPU with 2.0 GB")
    assert len(said) == 7
    assert all(line.startswith("    --") and line.endswith(")") for line in said[3:6])
    assert (
        said[6]
        == "  no checkpoint is saved yet: --resume_from_checkpoint auto starts from the base, in the same folder"
    )


def test_the_checkpoint_to_resume_from(tmp_path):
    args = arguments(tmp_path, "--use_lora", "true", "--gradient_checkpointing", "true", "--deepspeed", "none")
    args.training.per_device_train_batch_size = 1
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    write(tmp_path / "checkpoint-5", 5, describe(args.training))
    said = report(args, replace(SHAPE, batch=1, items=0), step=12)
    assert said.endswith("\n  add --resume_from_checkpoint auto to continue from checkpoint-5")
    quantised = [line for line in said.splitlines() if "--q_lora" in line]
    assert quantised
    assert all(line.endswith("; a new run, not from checkpoint-5)") for line in quantised)


def test_an_estimate_that_fails_does_not_hide_the_error(tmp_path):
    def unusable() -> SampleShape:
        raise ArgumentError("none of the records can be used")

    said = report(arguments(tmp_path), unusable, step=0)
    assert said.startswith("out of GPU memory on rank 0 in step 1 of 20: 0.5 GB asked for")
    assert "python -m finetune plan lists settings that fit (here: ArgumentError: none of the records" in said


def test_loading_and_evaluation_are_told_apart(tmp_path):
    args = arguments(tmp_path, "--per_device_eval_batch_size", "8", *EVALUATION)
    assert report(args).startswith("out of GPU memory on rank 0 while the model was loaded: 0.5 GB")
    said = report(args, step=7, training=False)
    assert "in the evaluation after step 7" in said
    assert [line.split()[0] for line in said.splitlines()[2:5]] == [
        "--per_device_eval_batch_size", "--eval_max_new_tokens", "--eval_strategy",
    ]  # fmt: skip


def test_other_errors_pass(tmp_path):
    args = arguments(tmp_path)
    with (
        pytest.raises(RuntimeError, match="^shapes$"),
        OutOfMemoryReport(SMALL, args.training, args.lora, lambda: SHAPE),
    ):
        raise RuntimeError("shapes")


def test_one_rank_of_several_explains(tmp_path, monkeypatch):
    """Rank 2 waits for the explanation of rank 1."""
    monkeypatch.setattr(out_of_memory, "_GATHER", 0.0)
    monkeypatch.setenv(RUN_FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    assert out_of_memory.told_by_first() is None
    timer = threading.Timer(0.3, out_of_memory.tell, ["why"])
    timer.start()
    monkeypatch.setenv("RANK", "2")
    assert out_of_memory.told_by_first() == "why"
    timer.join()
