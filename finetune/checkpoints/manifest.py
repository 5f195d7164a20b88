"""manifest.json: the last file written into a checkpoint folder; a folder whose manifest matches is complete."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.arguments.training import TrainingArguments, row_capacity
from finetune.runtime import distributed

NAME = "manifest.json"
_FORMAT = 2
# Format 1 has no identity of the run: what it lacks is not compared.
_READABLE = (1, _FORMAT)
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
        written: seconds since 1970, for people: clocks differ between machines, so nothing is decided by it.
        files: by path relative to the folder.
        order: how batches are made of the samples, in words; empty where an older version did not note it.
        run: id of the run, kept when it is resumed; this and what follows is empty in format 1.
        attempt: how often the run was started until this was written.
        base: of ``identity.base_of``.
        data: of ``identity.data_of``, with the number of samples.
        flags: every flag, in plain types.
        versions: of the libraries.
        doubt: why the weights are probably not worth going on from; empty where nothing is known against them.
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
    run: str = ""
    attempt: int = 0
    base: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    doubt: str = ""

    @property
    def age(self) -> tuple[int, int]:
        """Orders the checkpoints of a run from old to new, whatever the clocks say: start of the run, then step."""
        return self.attempt, self.step


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
    """Writes the manifest of all files in ``folder``.

    Raises:
        OSError: it cannot be written.
    """
    _put(folder, Manifest(step=step, written=time.time(), files=_hash_all(folder), **layout))


def cast_doubt(folder: Path, reason: str) -> None:
    """Notes in a manifest why its weights are probably not worth going on from.

    Raises:
        OSError: it cannot be written.
    """
    if (manifest := read(folder)) is not None:
        _put(folder, replace(manifest, doubt=reason))


def _put(folder: Path, manifest: Manifest) -> None:
    """Renames a finished file into place."""
    unfinished = folder / f"{NAME}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / NAME)


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder; None when it has none that this version can read."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if values.pop("format") not in _READABLE:
            return None
        files = {name: File(**entry) for name, entry in values.pop("files").items()}
        manifest = Manifest(files=files, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if _typed(manifest) else None


def _typed(manifest: Manifest) -> bool:
    """Whether the values that decisions are made on are of their types."""
    whole = (manifest.step, manifest.world_size, manifest.zero_stage, manifest.attempt)
    tables = (manifest.base, manifest.data, manifest.flags, manifest.versions)
    words = (manifest.method, manifest.order, manifest.run, manifest.doubt)
    inside = (not Path(name).is_absolute() and ".." not in Path(name).parts for name in manifest.files)
    return (
        all(isinstance(value, int) for value in whole)
        and all(isinstance(value, dict) for value in tables)
        and all(isinstance(value, str) for value in words)
        and all(inside)
    )


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
