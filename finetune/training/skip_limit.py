"""Stops a run that leaves out too many of its samples: what is left may be no sample of the data any more."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.encoding.sample_policy import BAD_SAMPLES, SamplePolicy, share_is_bad
from finetune.utils.errors import WorthlessError

# The ranks add their counts up once in so many optimizer steps.
_EVERY = 10
_NAMED = 3


class BadShareCallback(TrainerCallback):
    """Stops the run when more than ``sample_policy.max_bad_share`` of its samples could not be used.

    The counts of all ranks and their loader processes are added up every 10 optimizer steps, once 50 samples were
    taken, and when training ends. Loader processes are ahead of training, and so are the counts. A resumed run counts
    anew.

    Args:
        sample_policy: of the training data.
    """

    def __init__(self, sample_policy: SamplePolicy) -> None:
        self._intake = sample_policy

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Judges the counts, now and then.

        Raises:
            WorthlessError: on every rank, too much was left out.
        """
        if state.global_step % _EVERY == 0:
            self._judge(args, ended=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Judges the counts of a run of any length.

        Raises:
            WorthlessError: on every rank, too much was left out.
        """
        self._judge(args, ended=True)

    def _judge(self, args: TrainingArguments, *, ended: bool) -> None:
        if self._intake.on_bad_sample != "skip":
            return
        total = reduce(torch.tensor(self._intake.totals(), device=args.device), reduction="sum")
        assert isinstance(total, torch.Tensor)
        taken, bad = map(int, total.tolist())
        if share_is_bad(bad, taken, self._intake.max_bad_share, few=ended):
            raise WorthlessError(
                f"{bad} of {taken} samples taken could not be used, more than --max_bad_share "
                f"{self._intake.max_bad_share:g} allows{_latest(Path(args.output_dir or '.') / BAD_SAMPLES)}. Mend the "
                "data, or raise --max_bad_share if so many are expected to be unusable"
            )


def _latest(report: Path) -> str:
    """The last causes that are listed, to stand in a message."""
    if not report.is_file():
        return ""
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    causes = [line["message"] for line in lines if line["exception"] != "OverlongError"][-_NAMED:]
    return f"; the latest: {'; '.join(causes)} ({report} lists all)" if causes else ""
