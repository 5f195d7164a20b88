"""Stops a run in which too many samples have errors (--max_bad_share); those that are only too long do not count."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.encoding.sample_policy import BAD_SAMPLES, SamplePolicy, share_is_bad
from finetune.utils.errors import UnusableResultError

# Optimizer steps between two reductions of the counts.
_EVERY = 10
# Causes in the message.
_NAMED = 3


class BadShareCallback(TrainerCallback):
    """Stops the run when more than ``policy.max_bad_share`` of its samples could not be used.

    The counts of all ranks and their dataloader workers are summed every 10 optimizer steps, from 50 samples on, and
    when training ends. Workers prefetch, so the counts are ahead of training. A resumed run starts its counts at 0.

    Args:
        policy: of the training data.
    """

    def __init__(self, policy: SamplePolicy) -> None:
        self._policy = policy

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Checks the counts every 10 steps.

        Raises:
            UnusableResultError: too many samples were skipped; raised on every rank.
        """
        if state.global_step % _EVERY == 0:
            self._check(args, ended=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Checks the counts of a run of any length.

        Raises:
            UnusableResultError: too many samples were skipped; raised on every rank.
        """
        self._check(args, ended=True)

    def _check(self, args: TrainingArguments, *, ended: bool) -> None:
        if self._policy.on_bad_sample != "skip":
            return
        total = reduce(torch.tensor(self._policy.totals(), device=args.device), reduction="sum")
        assert isinstance(total, torch.Tensor)
        taken, bad = map(int, total.tolist())
        if share_is_bad(bad, taken, self._policy.max_bad_share, few=ended):
            raise UnusableResultError(
                f"{bad} of {taken} samples taken could not be used, more than --max_bad_share "
                f"{self._policy.max_bad_share:g} allows{_latest(Path(args.output_dir or '.') / BAD_SAMPLES)}. Correct "
                "the data, or raise --max_bad_share if that many bad samples are expected"
            )


def _latest(report: Path) -> str:
    """The last causes in the report, for a message."""
    if not report.is_file():
        return ""
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    causes = [line["message"] for line in lines if line["exception"] != "OverlongError"][-_NAMED:]
    return f"; the latest: {'; '.join(causes)} ({report} lists all)" if causes else ""
