"""The output folder of a run: what may be written there, what a former run left, and what becomes of that."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.checkpoints.manifest import checkpoints
from finetune.checkpoints.output_lock import OutputLock
from finetune.runtime import outcome
from finetune.utils.errors import UserError
from finetune.utils.json_objects import read_object

logger = logging.getLogger(__name__)

RECORDS = ".finetune"
"""Folder in OUTPUT_DIR with the lock of the run that writes there, and the list of what runs have written."""

FILES = "files.json"
"""Of RECORDS: the names, below OUTPUT_DIR, of what runs of this toolkit wrote."""

# What every run may write, whatever its method.
_RUN = "run.yaml"
_ALWAYS = (
    _RUN,
    "README.md",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "trainer_log.jsonl",
    "loss.png",
    "report.html",
    "bad_samples.jsonl",
    "hang",
)
# Names that only a run gives, as patterns.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MODEL = ("config.json", "model*.safetensors", "model.safetensors.index.json")
_LOGS = "runs"
# What a run that saved nothing leaves; such a folder may be used again.
_BEGUN = (RECORDS, _RUN, _LOGS)
# Where a former result is kept, with a number.
_FORMER = ".former-"


class OutputError(UserError):
    """An output folder that must not be written to."""


@dataclass(frozen=True, slots=True)
class Input:
    """Something that a run reads.

    Attributes:
        flag: by which it was given.
        path: absolute.
    """

    flag: str
    path: Path


class OutputFolder:
    """The output folder of a run.

    ``check`` looks, ``own`` keeps others away, ``open`` changes what is there, once everything else was looked at, and
    ``finish`` removes what was replaced. Only the main process does these. Leaving the context lets other runs in.

    Args:
        folder: absolute; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = folder / RECORDS
        self._use_lora = self._resuming = False
        self._side_files: list[str] = []
        self._ownership: OutputLock | None = None

    def check(
        self,
        inputs: Iterable[Input],
        side_files: Iterable[str],
        *,
        use_lora: bool,
        resuming: bool,
        overwrite: bool,
    ) -> None:
        """Whether the run may write here; nothing is changed.

        Args:
            inputs: what the run reads.
            side_files: names that it copies from its base.
            use_lora: whether it writes an adapter or a model.
            resuming: whether it goes on with the run that wrote here.
            overwrite: whether a former result may be replaced.

        Raises:
            OutputError: it is, holds or lies in something that is read; it has files and neither was asked for; or
                files that no run of this toolkit wrote would be replaced.
        """
        self._use_lora, self._resuming, self._side_files = use_lora, resuming, list(side_files)
        for given in inputs:
            self._check_apart(given)
        with self._in_words():
            self._check_contents(resuming=resuming, overwrite=overwrite)

    def _check_contents(self, *, resuming: bool, overwrite: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"OUTPUT_DIR {self.folder} is a file; give a folder")
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if not resuming and not overwrite and any(name not in _BEGUN for name in names):
            raise OutputError(
                f"OUTPUT_DIR {self.folder} is not empty: choose another, continue its run with "
                "--resume_from_checkpoint auto, or replace it with --overwrite_output_dir true"
            )
        ours = self._written()
        foreign = sorted(path.name for path in self._would_write() if path.name not in ours)
        if foreign:
            raise OutputError(
                f"OUTPUT_DIR {self.folder} has files that no run of this toolkit is known to have written, and this "
                f"run would replace them: {', '.join(foreign[:8])}. Choose another folder, or move them away"
            )

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def own(self) -> None:
        """Makes the folder and keeps other runs away from it until this process ends.

        Raises:
            OwnedError: another run writes to it.
        """
        with self._in_words():
            self._ownership = OutputLock(self._records)
        outcome.at_end(self.release)

    def open(self) -> None:
        """Moves what a former run wrote aside, unless it is gone on with, and lists what this one will write."""
        with self._in_words():
            ours = self._written()
            if not self._resuming:
                self._move_aside(ours)
                ours = {}
            planned = [*_ALWAYS, *self._fixed()]
            self._write_list({**ours, **dict.fromkeys(planned)})

    @property
    def written(self) -> list[str]:
        """Names below the folder that runs have written, or this one is about to."""
        return list(self._written())

    def add(self, *names: str) -> None:
        """Lists what is about to be written below the folder."""
        self._write_list({**self._written(), **dict.fromkeys(names)})

    def logs(self) -> list[str]:
        """Names in the folder of the loggers."""
        return [f"{_LOGS}/{path.name}" for path in sorted((self.folder / _LOGS).glob("*"))]

    def finish(self) -> None:
        """The result is complete: what a former run wrote goes."""
        self.add(*(path.name for pattern in _MODEL for path in self.folder.glob(pattern)) if not self._use_lora else ())
        self._write_list({name: None for name in self._written() if (self.folder / name).exists()})
        for former in self._former().values():
            remove(former, _listed(former))

    def release(self) -> None:
        """Lets other runs write here."""
        if self._ownership is not None:
            self._ownership.release()
            self._ownership = None
            for folder in (self._records, self.folder):  # as it was, where nothing came of the run
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"OUTPUT_DIR {self.folder} cannot be used: {error.strerror or error} ({error.filename}). Choose "
                "another folder, or mend its permissions or its disk"
            ) from error

    def _check_apart(self, given: Input) -> None:
        folder, path = self.folder.resolve(), given.path.resolve()
        if folder == path or folder in path.parents:
            how = "is" if folder == path else "holds"
        elif path.is_dir() and path in folder.parents:
            how = "lies in"
        else:
            return
        raise OutputError(f"OUTPUT_DIR {self.folder} {how} {path}, which is read ({given.flag}): choose another folder")

    def _fixed(self) -> list[str]:
        """Names of this run's method and base; those of shards follow from the weights."""
        own = _ADAPTER if self._use_lora else ("config.json", "model.safetensors", "model.safetensors.index.json")
        return [*own, *self._side_files]

    def _would_write(self) -> list[Path]:
        patterns = [*_ALWAYS, *self._fixed(), *(() if self._use_lora else _MODEL)]
        found = {path for pattern in patterns for path in self.folder.glob(pattern)}
        return sorted(found.union(folder for _, folder in checkpoints(self.folder)))

    def _written(self) -> dict[str, None]:
        """What runs have written, in order; all that looks so where an earlier version kept no list of its run."""
        if (self._records / FILES).is_file() or not is_run(self.folder / _RUN):
            return dict.fromkeys(_listed(self.folder))
        return dict.fromkeys([path.name for path in self._would_write()] if self._resuming else [_RUN])

    def _write_list(self, names: Mapping[str, None]) -> None:
        self._records.mkdir(parents=True, exist_ok=True)
        unfinished = self._records / f"{FILES}.tmp"
        unfinished.write_text(json.dumps({"files": list(names)}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._records / FILES)

    def _former(self) -> dict[int, Path]:
        """Where former results are kept, by number."""
        found = ((path.name.removeprefix(_FORMER), path) for path in sorted(self.folder.glob(f"{_FORMER}*")))
        return {int(number): path for number, path in found if number.isdecimal()}

    def _move_aside(self, ours: Iterable[str]) -> None:
        present = [name for name in ours if (self.folder / name).exists()]
        if not present:
            return
        former = self.folder / f"{_FORMER}{1 + max(self._former(), default=0)}"
        # The list first: whatever ends the process in between, all that is moved is known to be ours.
        OutputFolder(former)._write_list(dict.fromkeys(present))
        for name in present:
            target = former / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).rename(target)
        logger.info("the former result is kept in %s until the new one is complete", former)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Removes what is listed, and the folders that are empty then; anything else stays."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent != folder and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    shutil.rmtree(folder / RECORDS, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def is_run(path: Path) -> bool:
    """Whether a file is the description of a run of this toolkit, see ``saving.write_run``."""
    if not path.is_file():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {"flags:", "base:", "versions:"} <= set(lines)


class LogsCallback(TrainerCallback):
    """Lists the folders of loggers that have begun with the training; add it after them."""

    def __init__(self, output: OutputFolder) -> None:
        self._output = output
        self._known = output.logs()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lists what is new, on the main process."""
        if state.is_world_process_zero:
            self._output.add(*(name for name in self._output.logs() if name not in self._known))


def _listed(folder: Path) -> list[str]:
    path = folder / RECORDS / FILES
    if not path.is_file():
        return []
    names = [name for name in read_object(path).get("files", []) if isinstance(name, str)]
    # Only what lies below the folder: the list may have been edited, or come from elsewhere.
    return [name for name in names if ".." not in Path(name).parts and not Path(name).is_absolute()]
