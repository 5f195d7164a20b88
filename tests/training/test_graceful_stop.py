"""StopCallback saves and stops on a signal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.runtime import outcome
from finetune.training.graceful_stop import StopCallback, StoppedError


@pytest.mark.parametrize(
    ("weights_only", "how"), [(False, "auto continues from there"), (True, "this one cannot be resumed")]
)
def test_a_run_that_is_asked_to_stop_saves_once_and_ends(monkeypatch, weights_only, how):
    monkeypatch.setattr(outcome, "watch", SimpleNamespace(saved=lambda: None))
    asked = [False]
    stop = StopCallback(20, lambda: asked[0])
    args = TrainingArguments("out", save_only_model=weights_only, eval_strategy="no")
    control, state = TrainerControl(), TrainerState(global_step=4, max_steps=9)
    stop.on_step_end(args, state, control)
    stop.check(args, state)
    assert not control.should_save
    asked[0] = control.should_evaluate = True
    stop.on_step_end(args, state, control)
    assert (control.should_evaluate, control.should_save, control.should_training_stop) == (False, True, True)
    control.should_evaluate = control.should_save = True  # as the end of an epoch asks for
    stop.on_epoch_end(args, state, control)
    assert (control.should_evaluate, control.should_save) == (False, False)
    with pytest.raises(StoppedError, match=f"step 4 of 9 is saved in out/checkpoint-4; .*{how}"):
        stop.check(args, state)


@pytest.mark.parametrize(
    ("strategy", "step", "logged", "evaluated"),
    [
        ("steps", 6, [], True),
        ("steps", 6, [6], False),
        ("steps", 6, [3], True),
        ("steps", 5, [3], False),
        ("steps", 0, [], False),
        ("epoch", 6, [], False),
        ("epoch", 8, [], True),
        ("epoch", 8, [8], False),
        ("no", 6, [], False),
    ],
)
def test_an_evaluation_that_a_stop_left_out_is_made_up_for(monkeypatch, strategy, step, logged, evaluated):
    monkeypatch.setattr(outcome, "watch", SimpleNamespace(can_save=lambda *_: None))
    args = TrainingArguments("out", eval_strategy=strategy, eval_steps=3)
    history = [{"step": step, "loss": 1.0}, *({"step": each, "eval_loss": 1.0} for each in logged)]
    state = TrainerState(global_step=step, epoch=step / 4, eval_steps=3, log_history=history)
    stop = StopCallback(20, lambda: False)
    stop.on_train_begin(args, state, TrainerControl())
    assert args.eval_on_start is evaluated
    stop.on_epoch_begin(args, state, TrainerControl())
    assert args.eval_on_start is False
