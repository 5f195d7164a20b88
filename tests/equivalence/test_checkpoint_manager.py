"""CheckpointManager in one process: non-finite weights, failed writes, rotation of checkpoints."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stack import LORA, build, flags, unwrapped
from torch import nn
from transformers import TrainerCallback

from finetune.checkpoints import checkpoint_manager, disk_space, manifest
from finetune.checkpoints.background_manifest import BackgroundManifest
from finetune.checkpoints.disk_space import SpaceError, check_space, checkpoint_size, write_fault
from finetune.checkpoints.manifest import checkpoints, read
from finetune.checkpoints.resume import choose_checkpoint
from finetune.evaluation import progress_files
from finetune.evaluation.progress_files import ProgressCallback
from finetune.runtime import outcome
from finetune.training.training_checks import NonFiniteError
from finetune.utils.errors import NotSavedError, UnusableResultError
from trainer import CPMTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
SAVED = ("--save_strategy", "steps", "--save_steps", "1", "--max_slice_nums", "1", "--max_steps", "4")
Make = Callable[..., CPMTrainer]


@pytest.fixture
def make(tiny, demo_data, tmp_path) -> Make:
    def made(*more: str) -> CPMTrainer:
        return build(flags(tiny("llama3_v2_5"), demo_data, tmp_path / "out", *LORA, *SAVED, *more))

    return made


def left(trainer: CPMTrainer) -> list[int]:
    """Steps of the complete checkpoints."""
    found = checkpoints(Path(trainer.args.output_dir or ""))
    return [step for step, folder in found if read(folder) is not None]


def after_step(trainer: CPMTrainer, step: int, do: Callable[[], object]) -> None:
    """Does something when a step is made, before anything is saved."""
    original = trainer.log

    def log(logs: dict[str, float], start_time: float | None = None) -> None:
        if trainer.state.global_step == step:
            do()
        original(logs, start_time)

    trainer.log = log


def spoil(trainer: CPMTrainer, value: float) -> None:
    with torch.no_grad():
        unwrapped(trainer).get_parameter("base_model.model.resampler.kv_proj.weight").fill_(value)


@pytest.mark.parametrize("value", [torch.nan, 3e38])
def test_weights_that_are_spoilt_evict_no_good_ones(make, caplog, value):
    """Finite ones that give no finite step are known by that."""
    trainer = make("--save_total_limit", "1", "--max_steps", "8")
    after_step(trainer, 2, lambda: spoil(trainer, value))
    with pytest.raises(NonFiniteError, match=r"3 to 5.*but the update of step 2 may be the cause") as stop:
        trainer.train()
    assert stop.value.exit_code == outcome.UNUSABLE_RESULT
    assert left(trainer) == ([1] if value != value else [1, 2])  # noqa: PLR0124 - NaN
    output = Path(trainer.args.output_dir or "")
    again = make("--resume_from_checkpoint", "auto")
    assert choose_checkpoint(again.args, output) == output / "checkpoint-1"  # pyright: ignore[reportArgumentType]
    assert "no checkpoint-3 is written: the last 1 steps were not finite" in caplog.text
    spoil(trainer, torch.nan)
    said = r"not finite: .*kv_proj\.weight\. The result is not saved.*checkpoint-1\."
    with pytest.raises(UnusableResultError, match=said):
        trainer.save_model()
    assert not list(output.glob("*.safetensors"))


def test_a_run_that_learnt_nothing_has_no_result(make):
    trainer = make("--max_nonfinite_steps", "0", "--max_steps", "2")
    spoil(trainer, torch.nan)
    with pytest.raises(UnusableResultError, match="none of the 2 steps was finite"):
        trainer.train()
    assert left(trainer) == []
    trainer = make()
    trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    with pytest.raises(UnusableResultError, match=r"0 steps were trained: --max_steps -1, --num_train_epochs 0"):
        trainer.train()


def test_a_run_whose_last_step_was_not_finite_is_not_well(make):
    trainer = make("--max_nonfinite_steps", "0", "--max_steps", "2")

    def ruin(_: nn.Module, __: object, result: torch.Tensor) -> torch.Tensor:
        return result * torch.nan if trainer.state.global_step == 1 else result

    unwrapped(trainer).get_submodule("base_model.model.resampler").register_forward_hook(ruin)
    trainer.train()
    trainer.save_model()
    assert left(trainer) == [1]
    error = trainer.checkpoint_manager.final_error(trainer.args)
    assert isinstance(error, UnusableResultError)
    assert str(error).startswith("the last 1 steps were not finite. The saved weights are finite")


def full_disk(monkeypatch, trainer: CPMTrainer, steps: tuple[int, ...]) -> None:
    """torch's writer has no space at some steps."""
    original = torch.save

    def save(value: Any, path: Any, **options: Any) -> None:
        if trainer.state.global_step in steps and str(path).endswith("optimizer.pt"):
            Path(str(path)).write_bytes(b"cut")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 210496 vs 210388")
        original(value, path, **options)

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize(("steps", "expected"), [((2, 3), [1, 4]), ((4,), [1, 2, 3])])
def test_a_save_that_fails_is_said_and_training_goes_on(make, monkeypatch, caplog, steps, expected):
    trainer = make()
    full_disk(monkeypatch, trainer, steps)
    trainer.train()
    assert left(trainer) == expected
    assert len(list(Path(trainer.args.output_dir or "").glob("checkpoint-*"))) == len(expected), "no half one is left"
    for step in steps:
        assert f"checkpoint-{step} could not be written: [enforce fail" in caplog.text
    assert "needed, " in caplog.text
    assert "free in " in caplog.text
    trainer.save_model()
    if 4 in steps:
        error = trainer.checkpoint_manager.final_error(trainer.args)
        assert error is not None
        assert error.exit_code == outcome.NOT_SAVED
        assert re.match(r"the result is saved in .*, but .*checkpoint-4 could not", str(error))
    else:
        assert trainer.checkpoint_manager.final_error(trainer.args) is None


def test_no_space_is_known_before_writing(make, monkeypatch, caplog):
    trainer = make("--max_steps", "2")
    usage = shutil.disk_usage("/")
    free = iter([10**12, 1000, 1000, 10**12])
    monkeypatch.setattr(
        disk_space.shutil, "disk_usage", lambda _: SimpleNamespace(**usage._asdict() | {"free": next(free)})
    )
    trainer.train()
    assert left(trainer) == [2]
    assert "checkpoint-1 could not be written: no space left on the device (about " in caplog.text
    assert "1 kB free in" in caplog.text


def test_a_result_that_cannot_be_written_leaves_the_former_one(make, monkeypatch):
    trainer = make("--save_strategy", "no", "--max_steps", "1")
    trainer.train()
    trainer.save_model()
    output = Path(trainer.args.output_dir or "")
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert "adapter_model.safetensors" in before
    error = OSError(errno.EROFS, "Read-only file system")

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("trainer.finish_adapter", refuse)
    with pytest.raises(
        NotSavedError, match=r"the result could not be written: the file system is read-only \(.* free in"
    ):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
    assert load_file(output / "adapter_model.safetensors")


def test_what_is_about_something_else_is_not_taken_for_a_full_disk():
    assert write_fault(RuntimeError("CUDA error: an illegal memory access was encountered")) is None
    assert write_fault(KeyError("a")) is None
    assert write_fault(OSError(errno.ENOSPC, "x")) == "no space left on the device"


def test_the_best_and_the_newest_stay(make):
    best = ("--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true")
    trainer = make("--save_total_limit", "1", *best, "--learning_rate", "1e-9")
    values = iter([3.0, 1.0, 2.0, 2.5, 2.5])
    trainer.evaluate = lambda *_, **__: {"eval_loss": next(values)}  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    assert left(trainer) == [2, 4]
    assert trainer.args.save_total_limit == 1


def test_space_is_estimated_and_compared_before_step_1(make, monkeypatch, caplog, tmp_path):
    trainer = make("--max_steps", "1")
    size = checkpoint_size(unwrapped(trainer), trainer.args)
    trainer.train()
    written = disk_space.written_size(tmp_path / "out" / "checkpoint-1")
    assert size == pytest.approx(written, rel=0.1)
    monkeypatch.setattr(disk_space, "free_space", lambda _: size - 1)
    with pytest.raises(SpaceError, match=r"a checkpoint takes about .* MB, .* has .* free: free disk space"):
        check_space(tmp_path, size, 2)
    monkeypatch.setattr(disk_space, "free_space", lambda _: 2 * size)
    caplog.clear()
    check_space(tmp_path, size, 2)
    assert not caplog.text
    check_space(tmp_path, size, 3)
    assert "3 checkpoints (--save_total_limit and the one being written) take about" in caplog.text


def test_reports_that_cannot_be_written_end_nothing(make, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    trainer = make("--report_to", "tensorboard", "--max_steps", "3")
    trainer.add_callback(ProgressCallback())
    monkeypatch.setattr(progress_files, "plot_training_curves", refuse)
    monkeypatch.setattr(progress_files, "_append", refuse)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", refuse)
    trainer.train()
    assert trainer.state.global_step == 3
    assert caplog.text.count("trainer_log.jsonl cannot be written, training continues") == 1
    assert caplog.text.count("TensorBoardCallback cannot write and is disabled") == 1


def test_rotation_waits_for_the_first_finite_step(make, monkeypatch):
    seen = []
    original = checkpoint_manager.rotate
    monkeypatch.setattr(checkpoint_manager, "rotate", lambda *args: (seen.append(left(trainer)), original(*args))[1])
    monkeypatch.setattr(BackgroundManifest, "busy", False)  # removed at once, which waits for the manifest
    trainer = make("--save_total_limit", "1", "--max_steps", "3")
    trainer.train()
    assert seen == [[1], [1, 2], [2, 3]]
    assert left(trainer) == [3]


def test_training_goes_on_while_a_checkpoint_is_completed(make, monkeypatch):
    """Two steps are done before the hashes are; the older checkpoint stays until the newer one is complete."""
    first, second = threading.Event(), threading.Event()
    original, seen = manifest.write, []

    def write(folder: Path, step: int, layout: dict[str, Any]) -> None:
        if step == 2:
            assert first.wait(60), "training waits for the manifest"
        original(folder, step, layout)
        second.set()

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, 2 in left(trainer)))
            if state.global_step == 4:
                second.clear()
                first.set()
                assert second.wait(60)

    monkeypatch.setattr(manifest, "write", write)
    trainer = make("--save_total_limit", "1", "--save_steps", "2", "--max_steps", "5")
    trainer.add_callback(Watch())
    trainer.train()
    assert seen[:4] == [(1, False), (2, False), (3, False), (4, False)]
    assert left(trainer) == [5]


def test_a_manifest_that_cannot_be_written_is_said(make, monkeypatch, caplog):
    original = manifest.write

    def write(folder: Path, step: int, layout: dict[str, Any]) -> None:
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, step, layout)

    monkeypatch.setattr(manifest, "write", write)
    trainer = make("--max_steps", "2", "--save_steps", "1")
    trainer.train()
    assert "checkpoint-2 is not complete and will be skipped: no space left on the device" in caplog.text
    error = trainer.checkpoint_manager.final_error(trainer.args)
    assert isinstance(error, NotSavedError)
    assert "checkpoint-2 is not complete" in str(error)
