"""The output folder of a run: checks before writing, its lock, the list of written files, replaced results."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.checkpoints.manifest import checkpoints
from finetune.checkpoints.output_lock import OutputLock
from finetune.model_folders.output_contents import (
    LOGS,
    RUN_FILE,
    STATE_FOLDER,
    OutputError,
    as_output_error,
    check_unused,
)
from finetune.runtime import outcome
from finetune.utils.json_objects import read_object

logger = logging.getLogger(__name__)

FILES = "files.json"
"""File in STATE_FOLDER with the names, relative to OUTPUT_DIR, of what runs of this toolkit wrote."""

# Files that a run of any method may write.
_ALWAYS = (
    RUN_FILE,
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
# Patterns of the files of a result.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MODEL = ("config.json", "model*.safetensors", "model.safetensors.index.json")
# Prefix of the folders that keep a previous result until the new one is complete; a number follows.
_FORMER = ".former-"


@dataclass(frozen=True, slots=True)
class Input:
    """A file or folder that a run reads.

    Attributes:
        flag: the flag that gives it.
        path: absolute.
    """

    flag: str
    path: Path


class OutputFolder:
    """The output folder of a run.

    ``check`` changes nothing; ``lock`` keeps other runs away; ``open`` is called after all other checks and moves a
    previous result aside; ``finish`` removes it. Only rank 0 calls these. Leaving the context releases the lock.

    Args:
        folder: absolute; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = folder / STATE_FOLDER
        self._use_lora = self._resuming = False
        self._side_files: list[str] = []
        self._lock: OutputLock | None = None

    def check(
        self,
        inputs: Iterable[Input],
        side_files: Iterable[str],
        *,
        use_lora: bool,
        resuming: bool,
        overwrite: bool,
    ) -> None:
        """Checks that the run may write here; nothing is changed.

        Args:
            inputs: files and folders that the run reads.
            side_files: names of the files that are copied from the base.
            use_lora: whether the run writes an adapter or a full model.
            resuming: whether it resumes the run that wrote here.
            overwrite: whether a previous result may be replaced.

        Raises:
            OutputError: the folder is, holds or lies in an input; it is not empty, and neither resuming nor overwrite
                is set; or files that no run of this toolkit wrote would be replaced.
        """
        self._use_lora, self._resuming, self._side_files = use_lora, resuming, list(side_files)
        for given in inputs:
            self._check_apart(given)
        with as_output_error(self.folder):
            self._check_contents(resuming=resuming, overwrite=overwrite)

    def _check_contents(self, *, resuming: bool, overwrite: bool) -> None:
        if self.folder.is_file() or not (resuming or overwrite):
            check_unused(self.folder)
        ours = self._written()
        unknown = sorted(path.name for path in self._would_write() if path.name not in ours)
        if unknown:
            raise OutputError(
                f"OUTPUT_DIR {self.folder} has files that no run of this toolkit is known to have written, and this "
                f"run would replace them: {', '.join(unknown[:8])}. Choose another folder, or move them away"
            )

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def lock(self) -> None:
        """Makes the folder and locks it until this process ends.

        Raises:
            OutputInUseError: another run writes to it.
        """
        with as_output_error(self.folder):
            self._lock = OutputLock(self._records)
        outcome.register_cleanup(self.release)

    def open(self) -> None:
        """Moves the files of a previous run aside, unless it is resumed; lists the files that this run will write."""
        with as_output_error(self.folder):
            ours = self._written()
            if not self._resuming:
                self._move_aside(ours)
                ours = {}
            planned = [*_ALWAYS, *self._fixed()]
            self._write_list({**ours, **dict.fromkeys(planned)})

    @property
    def written(self) -> list[str]:
        """Names relative to the folder of files that runs have written, or this one is about to write."""
        return list(self._written())

    def add(self, *names: str) -> None:
        """Adds names to the list of written files, before they are written."""
        self._write_list({**self._written(), **dict.fromkeys(names)})

    def logs(self) -> list[str]:
        """Names in the folder of the loggers."""
        return [f"{LOGS}/{path.name}" for path in sorted((self.folder / LOGS).glob("*"))]

    def finish(self) -> None:
        """Called when the result is complete: removes previous results."""
        self.add(*(path.name for pattern in _MODEL for path in self.folder.glob(pattern)) if not self._use_lora else ())
        self._write_list({name: None for name in self._written() if (self.folder / name).exists()})
        for previous in self._former().values():
            remove(previous, _listed(previous))

    def release(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            for folder in (self._records, self.folder):  # removed if the run wrote nothing
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

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
        """Names of the files of this run's method and base; names of shards are not known yet."""
        own = _ADAPTER if self._use_lora else ("config.json", "model.safetensors", "model.safetensors.index.json")
        return [*own, *self._side_files]

    def _would_write(self) -> list[Path]:
        patterns = [*_ALWAYS, *self._fixed(), *(() if self._use_lora else _MODEL)]
        found = {path for pattern in patterns for path in self.folder.glob(pattern)}
        return sorted(found.union(folder for _, folder in checkpoints(self.folder)))

    def _written(self) -> dict[str, None]:
        """Names of written files, in order; files that match the patterns if an earlier version kept no list."""
        if (self._records / FILES).is_file() or not is_run(self.folder / RUN_FILE):
            return dict.fromkeys(_listed(self.folder))
        return dict.fromkeys([path.name for path in self._would_write()] if self._resuming else [RUN_FILE])

    def _write_list(self, names: Mapping[str, None]) -> None:
        self._records.mkdir(parents=True, exist_ok=True)
        unfinished = self._records / f"{FILES}.tmp"
        unfinished.write_text(json.dumps({"files": list(names)}, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self._records / FILES)

    def _former(self) -> dict[int, Path]:
        """Folders of previous results, by number."""
        found = ((path.name.removeprefix(_FORMER), path) for path in sorted(self.folder.glob(f"{_FORMER}*")))
        return {int(number): path for number, path in found if number.isdecimal()}

    def _move_aside(self, ours: Iterable[str]) -> None:
        present = [name for name in ours if (self.folder / name).exists()]
        if not present:
            return
        previous = self.folder / f"{_FORMER}{1 + max(self._former(), default=0)}"
        # The list is written first, so that an interrupted move leaves no unlisted file.
        OutputFolder(previous)._write_list(dict.fromkeys(present))
        for name in present:
            target = previous / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).rename(target)
        logger.info("the previous result is kept in %s until the new one is complete", previous)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Removes the listed files, and folders that are empty then; other files are kept."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent != folder and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def is_run(path: Path) -> bool:
    """Whether a file is a run.yaml of this toolkit, see ``saving.write_run``."""
    if not path.is_file():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {"flags:", "base:", "versions:"} <= set(lines)


class LogsCallback(TrainerCallback):
    """Adds folders made by loggers at the start of training to the list of written files; add it after the loggers."""

    def __init__(self, output: OutputFolder) -> None:
        self._output = output
        self._known = output.logs()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lists new folders, on rank 0."""
        if state.is_world_process_zero:
            self._output.add(*(name for name in self._output.logs() if name not in self._known))


def _listed(folder: Path) -> list[str]:
    path = folder / STATE_FOLDER / FILES
    if not path.is_file():
        return []
    names = [name for name in read_object(path).get("files", []) if isinstance(name, str)]
    # Only paths inside the folder: the list may have been edited.
    return [name for name in names if ".." not in Path(name).parts and not Path(name).is_absolute()]
