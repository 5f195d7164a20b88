"""HangWatch ends a hanging run with stack traces; StopCallback saves and stops on a signal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.runtime import outcome
from finetune.training.graceful_stop import HangWatch, StopCallback, StoppedError

ROOT = Path(__file__).resolve().parent.parent.parent
HANGS = """
import sys, time
from finetune.runtime import outcome
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments
from finetune.media import worker_process
from finetune.training import graceful_stop
outcome.install_exit_handlers()
graceful_stop._POLL_SECONDS, graceful_stop._GATHER = 0.1, 0.5
class Stuck(Dataset):
    def __len__(self): return 4
    def __getitem__(self, index):
        worker_process.configure_worker(f"data.json, record {index}")
        while index == 2: time.sleep(1)
        return index
args, state, control = TrainingArguments(sys.argv[1]), TrainerState(), TrainerControl()
worker_process.enable_worker_reports()
watch = graceful_stop.HangWatch(2.0, lambda: ["data.json, record 0"])
watch.on_train_begin(args, state, control)
for step, _ in enumerate(DataLoader(Stuck(), batch_size=None, num_workers=1)):
    state.global_step = step
    watch.on_step_begin(args, state, control)
"""


def test_a_run_that_stands_still_ends_with_its_stacks_and_samples(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == outcome.FAILED, done.stderr
    message = json.loads(done.stdout.removeprefix("result="))["message"]
    assert message.startswith("step 2: nothing was finished for 2 seconds (--hang_timeout 2)")
    said = (tmp_path / "hang" / "step-2" / "rank-0.txt").read_text()
    assert "samples of the step so far: data.json, record 0" in said
    assert " encodes data.json, record 2" in said
    assert said.count("in __getitem__") == 1, "the stack of the dataloader worker"
    assert "in <module>" in said, "the stack of the rank"


def test_a_rank_that_only_waits_is_called_by_the_one_that_notices(tmp_path, monkeypatch):
    """All of them end with their stacks written, whoever stands still."""
    watch = HangWatch(600.0, list)
    monkeypatch.setattr(HangWatch, "_end", lambda self, silent: setattr(self, "_last", None) or ended.append(silent))
    ended: list[float] = []
    args, state = TrainingArguments(str(tmp_path)), TrainerState(global_step=3)
    with watch:
        watch.on_train_begin(args, state, TrainerControl())
        watch.on_step_begin(args, state, TrainerControl())
        (tmp_path / "hang" / "step-4").mkdir(parents=True)
        while not ended:
            pass
    assert ended[0] < 600


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
