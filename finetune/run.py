"""``train(...)`` from Python, for notebooks and scripts: the same run as ``python -m finetune train``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import finetune
from finetune.arguments.argv import mapping_to_argv
from finetune.early_check import check_early
from finetune.utils.errors import UserError

_ROOT = Path(finetune.__file__).resolve().parents[1]
_RESULT = "result="
_CHUNK = 4096


class RunFailedError(UserError):
    """A training run did not end well; the message is that of the run.

    Attributes:
        exit_code: the exit status of the run.
        result: the values of its ``result=`` line.
    """

    def __init__(self, message: str, exit_code: int, result: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.result = result


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a training run ended with.

    Attributes:
        folder: the adapter or full model; ``AutoPeftModel`` or ``AutoModel`` loads it.
        steps: optimizer steps.
        train_loss: mean loss per answer token over all steps.
        eval_loss: the last evaluation loss; None without evaluation data.
        verified: whether the saved result gave the logits of the trained model in a fresh process; None if not asked.
        values: every value of the ``result=`` line.
    """

    folder: Path
    steps: int
    train_loss: float | None
    eval_loss: float | None
    verified: bool | None
    values: Mapping[str, Any]


def train(config: str | os.PathLike[str] | None = None, *, nproc: int | None = None, **flags: Any) -> RunResult:
    """Trains in processes of its own and waits; their output is printed as it comes.

    Args:
        config: a YAML file of flags, of ours or of LLaMA-Factory.
        nproc: processes on this machine; None for one per visible GPU, or two without a GPU.
        flags: flags of training by name, over those of the file: ``learning_rate=1e-4``, ``tune_vision=False``. A list
            becomes several values; None is the default.

    Returns:
        The folder of the result, the losses, and whether it was verified.

    Raises:
        UserError: a wrong flag, model folder or data file; said before any process starts.
        RunFailedError: the run failed or was stopped.
    """
    argv = [] if config is None else [os.fspath(config)]
    argv += mapping_to_argv({name: _plain(value) for name, value in flags.items()}, "train()")
    check_early(argv)
    command = [sys.executable, "-m", "finetune", "train"]
    command += [] if nproc is None else ["--nproc", str(nproc)]
    paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*command, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        result = _show(process.stdout)
    except KeyboardInterrupt:  # the run saves what it has, as after Ctrl-C in a terminal
        process.send_signal(signal.SIGINT)
        result = _show(process.stdout)
    if (status := process.wait()) != 0 or "output_dir" not in result:
        raise RunFailedError(str(result.get("message") or f"the run ended with status {status}"), status, result)
    values = {name: result.get(name) for name in ("steps", "train_loss", "eval_loss", "verified")}
    return RunResult(Path(result["output_dir"]), **values, values=result)  # pyright: ignore[reportArgumentType]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _show(output: IO[bytes]) -> dict[str, Any]:
    """Prints output as it comes, progress bars included; the values of its ``result=`` line, empty without one."""
    last = b""
    while chunk := output.read1(_CHUNK):  # pyright: ignore[reportAttributeAccessIssue]
        sys.stdout.write(chunk.decode(errors="replace"))
        sys.stdout.flush()
        last = (last + chunk)[-64 * _CHUNK :]
    lines = last.decode(errors="replace").splitlines()
    found = [line.removeprefix(_RESULT) for line in lines if line.startswith(_RESULT)]
    return json.loads(found[-1]) if found else {}
