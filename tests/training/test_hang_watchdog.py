"""HangCallback ends a hanging run with stack traces."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune.runtime import outcome
from finetune.training.hang_watchdog import HangCallback

ROOT = Path(__file__).resolve().parent.parent.parent
HANGS = """
import sys, time
from finetune.runtime import outcome
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments
from finetune.media import worker_process
from finetune.training import hang_watchdog
outcome.install_exit_handlers()
hang_watchdog._POLL_SECONDS, hang_watchdog._GATHER = 0.1, 0.5
class Stuck(Dataset):
    def __len__(self): return 4
    def __getitem__(self, index):
        worker_process.configure_worker(f"data.json, record {index}")
        while index == 2: time.sleep(1)
        return index
args, state, control = TrainingArguments(sys.argv[1]), TrainerState(), TrainerControl()
worker_process.enable_worker_reports()
watch = hang_watchdog.HangCallback(2.0, lambda: ["data.json, record 0"])
watch.on_train_begin(args, state, control)
for step, _ in enumerate(DataLoader(Stuck(), batch_size=None, num_workers=1)):
    state.global_step = step
    watch.on_step_begin(args, state, control)
"""


def test_a_run_that_stands_still_ends_with_its_stacks_and_samples(tmp_path, forked_python):
    (tmp_path / "hangs.py").write_text(HANGS)
    command = [forked_python, str(tmp_path / "hangs.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
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
    watch = HangCallback(600.0, list)
    monkeypatch.setattr(HangCallback, "_end", lambda self, silent: setattr(self, "_last", None) or ended.append(silent))
    ended: list[float] = []
    args, state = TrainingArguments(str(tmp_path)), TrainerState(global_step=3)
    with watch:
        watch.on_train_begin(args, state, TrainerControl())
        watch.on_step_begin(args, state, TrainerControl())
        (tmp_path / "hang" / "step-4").mkdir(parents=True)
        while not ended:
            pass
    assert ended[0] < 600
