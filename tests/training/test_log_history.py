"""Figures of a training from the Trainer's log history."""

from __future__ import annotations

import pytest

from finetune.training.log_history import last_eval_loss, mean_train_loss


def test_mean_train_loss_weights_by_steps():
    history = [{"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 9.0}, {"step": 8, "loss": 2.0}, {"step": 8, "x": 1}]
    assert mean_train_loss(history) == pytest.approx(2.5)
    assert last_eval_loss(history) == 9.0
    assert mean_train_loss([]) is last_eval_loss([]) is None
