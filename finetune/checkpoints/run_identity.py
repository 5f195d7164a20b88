"""Identity of a run, recorded in every checkpoint: base, data, flags and versions of libraries."""

from __future__ import annotations

import hashlib
import json
import platform
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import finetune
from finetune.arguments.parse import Arguments
from finetune.checkpoints.base_checkpoint import BaseCheckpoint
from finetune.checkpoints.manifest import Manifest
from finetune.utils.cache import signature
from finetune.utils.errors import CheckpointError
from finetune.utils.paths import expand

_LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "numpy", "minicpm-o5-sdk")
# A secret, and an object that transformers derives from other flags.
_NOT_RECORDED = ("hub_token", "accelerator_config")
# Files of a base, beside its weights, that go into its digest.
_DESCRIBED = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer.model")
_DESCRIBED += ("tokenizer_config.json", "chat_template.jinja")
# A data file is identified by its first, its last and some blocks between: fast for any size.
_BLOCK = 1 << 16
_BLOCKS = 16


@dataclass(slots=True, kw_only=True)
class RunIdentity:
    """Identity of a run, as a manifest records it.

    Attributes:
        run: an id that is kept when the run is resumed.
        attempt: number of starts of the run.
        base: from ``base_of``.
        data: from ``data_of``.
        flags: every flag, as JSON values.
        versions: of the libraries.
    """

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    attempt: int = 1
    base: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    def continue_run(self, manifest: Manifest, attempts: Iterable[int]) -> None:
        """Takes the id of a checkpoint's run; ``attempts`` are those of its other checkpoints."""
        self.run = manifest.run or self.run
        self.attempt = 1 + max([manifest.attempt, *attempts])

    def manifest_fields(self) -> dict[str, Any]:
        """The fields of a manifest."""
        return {name: getattr(self, name) for name in ("run", "attempt", "base", "data", "flags", "versions")}


def identify(args: Arguments, base: BaseCheckpoint, data_files: Sequence[Path]) -> RunIdentity:
    """The identity of a run that is about to start.

    Raises:
        CheckpointError: the weights of the base cannot be read.
    """
    return RunIdentity(base=base_of(base), data=data_of(data_files), flags=flags_of(args), versions=versions())


def base_of(base: BaseCheckpoint) -> dict[str, Any]:
    """Name and family of a base, and a digest of its configuration and of headers and blocks of its weight files."""
    digest = hashlib.sha256()
    described = [base.folder / name for name in _DESCRIBED if (base.folder / name).is_file()]
    for path in sorted([*base.folder.glob("*.safetensors"), *described]):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        try:
            with path.open("rb") as file:
                if path.suffix == ".safetensors":
                    _update_with_header(digest, file)
                    _update_with_blocks(digest, file, path.stat().st_size)
                else:
                    digest.update(file.read())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return {"name": base.name, "revision": base.revision, "family": base.family.name, "digest": digest.hexdigest()}


def data_of(files: Iterable[Path]) -> dict[str, Any]:
    """Size and a digest of some blocks of every data file, by its name; unreadable files are skipped."""
    found = {}
    for path in files:
        try:
            size = path.stat().st_size
            digest = hashlib.sha256()
            with path.open("rb") as file:
                _update_with_blocks(digest, file, size)
        except OSError:
            continue  # reported when its records are read
        found[path.name] = {"bytes": size, "digest": digest.hexdigest()}
    return {"files": found}


def flags_of(args: Arguments) -> dict[str, Any]:
    """The resolved value of every flag, by name, converted to JSON values."""
    groups = (args.model, args.data, args.training, args.lora)
    named = ((entry.name, getattr(group, entry.name)) for group in groups for entry in fields(group))
    return {name: json.loads(json.dumps(value, default=str)) for name, value in named if name not in _NOT_RECORDED}


def reference_key(args: Arguments, base: BaseCheckpoint) -> str:
    """Text that changes with the model that a run starts from and with the way it computes, as far as it matters."""
    adapter = args.lora.lora_weight_path
    files = [] if adapter is None else sorted(expand(Path(adapter)).glob("adapter_*"))
    values = [base_of(base)["digest"], [signature(path) for path in files], args.lora.q_lora, versions()]
    return json.dumps([*values, args.training.compute_dtype, args.model.attn_implementation])


def versions() -> dict[str, str]:
    """Versions of this project and of the libraries that affect results."""
    found = {"finetune": finetune.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _update_with_header(digest: Any, file: BinaryIO) -> None:
    length = int.from_bytes(file.read(8), "little")
    digest.update(file.read(min(length, 1 << 27)))


def _update_with_blocks(digest: Any, file: BinaryIO, size: int) -> None:
    last = max(size - _BLOCK, 0)
    for number in range(_BLOCKS):
        file.seek(last * number // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK))
        if not last:
            return
