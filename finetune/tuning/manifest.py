"""manifest.json: the last file written into a checkpoint folder; a folder whose manifest matches is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune import distributed
from finetune.arguments import TrainingArguments
from finetune.batching import row_capacity

NAME = "manifest.json"
_FORMAT = 1
# hashlib releases the interpreter: several files are read at once, as fast as the disk allows.
_READERS = 8


@dataclass(frozen=True, slots=True)
class File:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a complete checkpoint folder holds and how the run that wrote it was laid out.

    Attributes:
        step: optimizer steps done.
        world_size: processes.
        zero_stage: ZeRO stage of DeepSpeed, 0 without it.
        method: "lora" or "full".
        batch_size: samples per device and micro-batch.
        accumulation: micro-batches per optimizer step.
        resumable: whether the optimizer's state was saved too.
        written: seconds since 1970.
        files: by path relative to the folder.
        order: how batches are made of the samples, in words; empty where an older version did not note it.
    """

    step: int
    world_size: int
    zero_stage: int
    method: str
    batch_size: int
    accumulation: int
    resumable: bool
    written: float
    files: dict[str, File]
    order: str = ""


def describe(training: TrainingArguments) -> dict[str, Any]:
    """The fields of a manifest that follow from the flags."""
    return {
        "world_size": distributed.world_size(),
        "zero_stage": zero_stage(training.deepspeed),
        "method": "lora" if training.use_lora else "full",
        "batch_size": training.per_device_train_batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "resumable": not training.save_only_model,
        "order": _order(training),
    }


def _order(training: TrainingArguments) -> str:
    rows = f"--packing {training.packing}"
    if training.packing == "best_fit":
        rows += f" in {row_capacity(training)} tokens"
    return f"{rows}, --train_sampling_strategy {training.train_sampling_strategy}"


def zero_stage(config: dict[str, Any] | str | None) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 without one."""
    values = json.loads(config) if isinstance(config, str) else config or {}
    return int(values.get("zero_optimization", {}).get("stage", 0))


def write(folder: Path, step: int, layout: dict[str, Any]) -> None:
    """Writes the manifest of all files in ``folder``, by renaming a finished file into place."""
    manifest = Manifest(step=step, written=time.time(), files=_hash_all(folder), **layout)
    text = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1) + "\n"
    unfinished = folder / f"{NAME}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / NAME)


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder; None when it has none that this version can read."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if values.pop("format") != _FORMAT:
            return None
        files = {name: File(**entry) for name, entry in values.pop("files").items()}
        return Manifest(files=files, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def fault(folder: Path, manifest: Manifest | None) -> str | None:
    """Why a folder is not what its manifest says; None when it is. Sizes are compared first, then hashes."""
    if manifest is None:
        return f"it has no {NAME}: the run ended while it was being written, or another tool wrote it"
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != expected.bytes:
            return f"{name} has {found} bytes instead of {expected.bytes}"
    for name, file in _hash_all(folder, manifest.files).items():
        if file != manifest.files[name]:
            return f"{name} has other content than when it was written"
    return None


def _hash_all(folder: Path, names: Iterable[str] | None = None) -> dict[str, File]:
    if names is None:
        found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = sorted(name for name in found if name not in (NAME, f"{NAME}.tmp"))
    names = list(names)
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True))


def _hash(path: Path) -> File:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path.stat().st_size, digest)


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint-N in an output folder, complete or not, by step."""
    found = []
    for path in output.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and path.is_dir():
            found.append((int(number), path))
    return sorted(found)


class ManifestCallback(TrainerCallback):
    """Completes every checkpoint with its manifest, and only then removes those beyond ``save_total_limit``.

    The Trainer would remove them before: a run killed while the manifest is written would be left with none.
    """

    def __init__(self) -> None:
        self._limit: int | None = None

    def on_train_begin(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the removal of old checkpoints over from the Trainer."""
        self._limit, args.save_total_limit = args.save_total_limit, None

    def on_train_end(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the flag back."""
        args.save_total_limit = self._limit

    def on_save(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Waits until every process has written its part, then hashes the folder."""
        assert isinstance(args, TrainingArguments)
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        output = Path(args.output_dir or "output")
        current = output / f"checkpoint-{state.global_step}"
        write(current, state.global_step, describe(args))
        if self._limit is not None and self._limit > 0:
            _rotate(output, self._limit, {current.name, Path(state.best_model_checkpoint or "").name})


def _rotate(output: Path, limit: int, kept: set[str]) -> None:
    """Removes checkpoints until ``limit`` are left: unfinished ones first, then the oldest; never ``kept``."""
    ages = []
    for step, folder in checkpoints(output):
        manifest = read(folder)
        ages.append((manifest is not None, manifest.written if manifest else 0.0, step, folder))
    surplus = max(len(ages) - limit, 0)
    for *_, folder in [age for age in sorted(ages) if age[-1].name not in kept][:surplus]:
        shutil.rmtree(folder, ignore_errors=True)
