"""manifest.json of a checkpoint: hashes of its files and the identity of its run, written last to mark it complete."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from finetune.arguments.training import TrainingArguments, row_capacity
from finetune.runtime import distributed

NAME = "manifest.json"
_FORMAT = 3
# Format 1 has no identity of the run, which is then not compared. Formats 1 and 2 have SHA-256.
_READABLE = (1, 2, _FORMAT)
# Threads that hash files; both packages release the GIL.
_READERS = 8
# Bytes read at once: copies out of the page cache take most of the time, and those of hashlib.file_digest, a quarter as
# large, take a quarter longer. Larger ones gain nothing more.
_BLOCK = 1 << 20
# Accidents are to be found here, not attacks: XXH3 is ten times as fast as SHA-256.
_HASHES: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
_HASH = "xxh3_128"


@dataclass(frozen=True, slots=True)
class File:
    """Size in bytes and hash of a file, ``xxh3_128:...`` or ``sha256:...`` in hexadecimal digits."""

    bytes: int
    digest: str

    @property
    def hash(self) -> str:
        """Name of the hash function."""
        return self.digest.partition(":")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Files of a complete checkpoint, and configuration and identity of the run that wrote it.

    Attributes:
        step: optimizer steps done.
        world_size: number of ranks.
        zero_stage: ZeRO stage of DeepSpeed, 0 without it.
        method: "lora" or "full".
        batch_size: samples per device and micro-batch.
        accumulation: micro-batches per optimizer step.
        resumable: whether the optimizer's state was saved too.
        written: seconds since 1970, for information only: clocks differ between machines.
        files: by path relative to the folder.
        order: flags that decide how samples become batches; empty if an older version did not record them.
        run: id of the run, kept when it is resumed; this and the following fields are empty in format 1.
        attempt: how often the run had been started when this was written.
        base: from ``run_identity.base_of``.
        data: from ``run_identity.data_of``.
        flags: every flag, as JSON values.
        versions: of the libraries.
        doubt: why the weights are probably unusable (no step from them was finite); empty otherwise.
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
        """Sort key of the checkpoints of a run, old to new, independent of clocks: start of the run, then step."""
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
    files = _hash_all(folder, dict.fromkeys(_files(folder), _HASH))
    _put(folder, Manifest(step=step, written=time.time(), files=files, **layout))


def mark_doubtful(folder: Path, reason: str) -> None:
    """Records in the manifest of a checkpoint why its weights are probably unusable.

    Raises:
        OSError: it cannot be written.
    """
    if (manifest := read(folder)) is not None:
        _put(folder, replace(manifest, doubt=reason))


def _put(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest to a temporary file and renames it into place."""
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
        if (version := values.pop("format")) not in _READABLE:
            return None
        entries = values.pop("files").items()
        if version < _FORMAT:
            entries = [(name, {"bytes": each["bytes"], "digest": f"sha256:{each['sha256']}"}) for name, each in entries]
        files = {name: File(**entry) for name, entry in entries}
        manifest = Manifest(files=files, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if _typed(manifest) else None


def _typed(manifest: Manifest) -> bool:
    """Whether the values have the right types, and all files are inside the folder."""
    integers = (manifest.step, manifest.world_size, manifest.zero_stage, manifest.attempt)
    tables = (manifest.base, manifest.data, manifest.flags, manifest.versions)
    texts = (manifest.method, manifest.order, manifest.run, manifest.doubt)
    inside = (not Path(name).is_absolute() and ".." not in Path(name).parts for name in manifest.files)
    return (
        all(isinstance(value, int) for value in integers)
        and all(isinstance(value, dict) for value in tables)
        and all(isinstance(value, str) for value in texts)
        and all(isinstance(file.digest, str) and file.hash in _HASHES for file in manifest.files.values())
        and all(inside)
    )


def fault(folder: Path, manifest: Manifest | None) -> str | None:
    """How a folder differs from its manifest; None if it matches. Sizes are compared first, then hashes."""
    if manifest is None:
        return f"it has no {NAME}: the run ended while it was being written, or another tool wrote it"
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != expected.bytes:
            return f"{name} has {found} bytes instead of {expected.bytes}"
    for name, file in _hash_all(folder, {name: file.hash for name, file in manifest.files.items()}).items():
        if file != manifest.files[name]:
            return f"the content of {name} has changed since it was written ({file.hash} differs)"
    return None


def _files(folder: Path) -> list[str]:
    """The files of a checkpoint, relative to it, without its manifest."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (NAME, f"{NAME}.tmp"))


def _hash_all(folder: Path, hashes: Mapping[str, str]) -> dict[str, File]:
    """Size and hash of files.

    Args:
        folder: of the checkpoint.
        hashes: name of the hash function by file.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _hash(folder / name, hashes[name]), hashes)
        return dict(zip(hashes, found, strict=True))


def _hash(path: Path, name: str) -> File:
    digest, block = _HASHES[name](), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
        return File(os.fstat(file.fileno()).st_size, f"{name}:{digest.hexdigest()}")


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint-N in an output folder, complete or not, by step."""
    found = []
    for path in output.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and path.is_dir():
            found.append((int(number), path))
    return sorted(found)
