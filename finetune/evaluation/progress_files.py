"""Progress of a training run: trainer_log.jsonl, loss.png and report.html, and the progress bar."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.evaluation.generation_evaluator import GeneratedAnswers
from finetune.evaluation.plots import PREFERENCE_PREFIXES, metric_names, plot_training_curves, plotted
from finetune.evaluation.training_report import RunFacts, build_run
from finetune.pages.html_page import write
from finetune.utils.errors import UserError
from finetune.utils.json_objects import nonfinite_as_null
from finetune.utils.number_format import significant

logger = logging.getLogger(__name__)

LOG_NAME = "trainer_log.jsonl"
PLOT_NAME = "loss.png"
REPORT_NAME = "report.html"
# The Trainer's name -> ours.
_FIGURES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "eval_loss": "eval_loss",
    "train_loss": "train_loss",
    "samples_per_second": "samples_per_second",
    "tokens_per_second": "tokens_per_second",
    "data_wait": "data_wait",
    "mfu": "mfu",
    "tflops_per_second": "tflops_per_second",
    "peak_memory_gb": "peak_memory_gb",
}


class ProgressCallback(TrainerCallback):
    """Writes the progress files into the output folder, on the main process.

    A line of trainer_log.jsonl has step, total_steps, epoch, elapsed and eta (seconds), those of ``_FIGURES`` that
    were logged, gradient norms of parts as ``grad_norm_<part>``, figures of preference pairs, and the metric of
    --eval_generate as ``eval_<metric>``; numbers that are not finite are null. A resumed run keeps the lines up to its
    checkpoint. A write error is logged once and does not stop training.

    Args:
        facts: description of the run; without it there is no report.html.
        answered: the questions of --eval_generate with their answers so far.
    """

    def __init__(self, facts: RunFacts | None = None, answered: Sequence[GeneratedAnswers] = ()) -> None:
        self._facts = facts
        self.answered = answered
        self._clock = 0.0
        self._elapsed = 0.0
        self._first_step = 0
        self._warned = False
        self._plotted: object = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the log, or truncates it at the step from which the run resumes."""
        self._clock, self._first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        path = _folder(args) / LOG_NAME
        kept = _lines_until(path, state.global_step) if state.global_step else []
        if kept:
            self._elapsed = json.loads(kept[-1])["elapsed"]
        self._try(path, lambda: path.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line per log event."""
        figures = {ours: logs[theirs] for theirs, ours in _FIGURES.items() if logs and theirs in logs}
        figures |= {
            name: value for name, value in (logs or {}).items() if name.startswith(("grad_norm_", *PREFERENCE_PREFIXES))
        }
        figures |= {name: logs[name] for name in metric_names(logs or {}) if logs}
        if not figures or not state.is_world_process_zero:
            return
        running = time.monotonic() - self._clock
        done = state.global_step - self._first_step
        eta = running / done * (state.max_steps - state.global_step) if done else None
        line = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "epoch": state.epoch,
            **figures,
            "elapsed": round(self._elapsed + running, 1),
            "eta": None if eta is None else round(eta, 1),
        }
        path = _folder(args) / LOG_NAME
        self._try(path, lambda: _append(path, json.dumps(nonfinite_as_null(line), allow_nan=False)))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes loss.png and report.html."""
        if not state.is_world_process_zero:
            return
        path = _folder(args) / PLOT_NAME
        if (curves := plotted(state.log_history)) != self._plotted or not path.is_file():
            self._try(path, lambda: plot_training_curves(state.log_history, path))
            self._plotted = curves
        facts = self._facts
        if facts is not None:
            page, seconds = _folder(args) / REPORT_NAME, self._elapsed + time.monotonic() - self._clock
            self._try(page, lambda: write(page, build_run(facts, args, state, self.answered, seconds)))

    def _try(self, path: Path, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, UserError) as error:
            if not self._warned:
                logger.warning("%s cannot be written, training continues: %s", path, error)
            self._warned = True


class ProgressBar(transformers.ProgressCallback):
    """transformers' progress bar and log lines, with numbers that have no exponent."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints one line per log event."""
        shown = {name: significant(v) if isinstance(v, float) else v for name, v in (logs or {}).items()}
        super().on_log(args, state, control, logs=shown, **kwargs)


class ErrorTolerantCallback(TrainerCallback):
    """Wraps a reporting callback: when it cannot write, it is disabled and training continues.

    Args:
        inner: a callback of transformers' integrations.
    """

    def __init__(self, inner: TrainerCallback) -> None:
        self.inner: TrainerCallback | None = inner

    def tell(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """Forwards an event."""
        try:
            return None if self.inner is None else getattr(self.inner, event)(*args, **kwargs)
        except OSError as error:
            logger.warning("%s cannot write and is disabled: %s", type(self.inner).__name__, error)
            self.inner = None
            return None


def _hand_on(event: str) -> Callable[..., Any]:
    def tell(self: ErrorTolerantCallback, *args: Any, **kwargs: Any) -> Any:
        return self.tell(event, *args, **kwargs)

    return tell


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(ErrorTolerantCallback, _event, _hand_on(_event))


def tolerate_write_errors(callbacks: list[TrainerCallback]) -> None:
    """Wraps, in place, the callbacks that only report to a service or file."""
    for place, callback in enumerate(callbacks):
        if type(callback).__module__.startswith("transformers.integrations"):
            callbacks[place] = ErrorTolerantCallback(callback)


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir or "output")


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of a log up to a step; it ends at an incomplete line of a killed run."""
    kept: list[str] = []
    if not path.is_file():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    return kept
