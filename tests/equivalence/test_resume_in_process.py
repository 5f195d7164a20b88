"""Resuming in one process without DeepSpeed is bit-identical to an uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stack import KINDS, build, flags, steps, trained

from finetune.checkpoints.manifest import checkpoints
from finetune.checkpoints.resume import choose_checkpoint
from finetune.runtime import outcome
from finetune.training.graceful_stop import StoppedError
from finetune.training.training_checks import TrainingChecks
from trainer import CPMTrainer


def evaluations(trainer: CPMTrainer) -> list[tuple[float, float]]:
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("kind", KINDS)
def test_five_and_five_steps_are_ten(tiny, demo_data, tmp_path, monkeypatch, kind):
    def made(output: Path, *more: str) -> CPMTrainer:
        shuffled = ("--train_sampling_strategy", "random", "--lora_dropout", "0.05", "--max_slice_nums", "1")
        saved = ("--max_steps", "10", "--save_strategy", "steps", "--save_steps", "5", "--lr_scheduler_type", "cosine")
        # Loader processes stay from epoch to epoch, those of a resumed run begin anew in its first.
        if kind == "lora":
            saved += ("--max_samples", "7", "--dataloader_num_workers", "1")
            saved += ("--eval_strategy", "steps", "--eval_steps", "3")
        dropout = shuffled if kind == "lora" else (*shuffled[:2], *shuffled[4:])
        return build(flags(tiny("llama3_v2_5"), demo_data, output, *KINDS[kind], *dropout, *saved, *more))

    whole = made(tmp_path / "out")
    whole.train()
    first = tmp_path / "out" / "checkpoint-5"
    resumed = made(tmp_path / "again", "--resume_from_checkpoint", str(first), "--save_steps", "4")
    chosen = choose_checkpoint(resumed.args, tmp_path / "again")  # pyright: ignore[reportArgumentType]
    assert chosen == first
    resumed.train(resume_from_checkpoint=str(chosen))
    assert steps(resumed) == steps(whole)
    assert [step for step, _ in checkpoints(tmp_path / "again")] == [8, 10], "saved when its own flags say"
    expected = trained(whole)
    assert [name for name, value in trained(resumed).items() if not torch.equal(value, expected[name])] == []
    if kind == "lora":  # stopped where an evaluation is due, which follows on resuming
        # A process that has saved ends soon after, this one too.
        monkeypatch.setattr(outcome.watch, "saved", lambda: None)
        stopped = made(tmp_path / "stopped")
        asked = property(lambda _: stopped.state.global_step == 3, lambda *_: None)
        monkeypatch.setattr(TrainingChecks, "stop_requested", asked, raising=False)
        with pytest.raises(StoppedError, match="step 3 of 10"):
            stopped.train()
        monkeypatch.undo()
        goes_on = made(tmp_path / "stopped", "--resume_from_checkpoint", "auto")
        goes_on.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))
        assert evaluations(goes_on) == evaluations(whole)
    # Once more from the end: there is nothing left to do, and nothing is done.
    done = made(tmp_path / "done")
    done.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    assert done.state.global_step == 10
    assert [name for name, value in trained(done).items() if not torch.equal(value, expected[name])] == []
