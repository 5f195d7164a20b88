"""What a run is: its base, its data, its flags and the libraries, as every checkpoint notes them."""

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
from finetune.checkpoints.base_checkpoint import Checkpoint
from finetune.checkpoints.manifest import Manifest
from finetune.utils.errors import CheckpointError

_LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "numpy")
# A secret, and an object that transformers derives from other flags.
_NOT_NOTED = ("hub_token", "accelerator_config")
# What a base says of itself beside its weights, where the folder has it.
_DESCRIBED = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer.model")
_DESCRIBED += ("tokenizer_config.json", "chat_template.jinja")
# Of a data file the first, the last and some pieces between are read: enough to tell files apart, quick for any size.
_PIECE = 1 << 16
_PIECES = 16


@dataclass(slots=True, kw_only=True)
class RunIdentity:
    """What a manifest says of a run beside its layout.

    Attributes:
        run: an id that resumed runs keep.
        attempt: counts the starts of the run.
        base: of ``base_of``.
        data: of ``data_of``.
        flags: every flag in plain types.
        versions: of the libraries.
    """

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    attempt: int = 1
    base: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    def go_on_from(self, manifest: Manifest, attempts: Iterable[int]) -> None:
        """Takes the id of the run that a checkpoint is of; ``attempts`` are those known of it."""
        self.run = manifest.run or self.run
        self.attempt = 1 + max([manifest.attempt, *attempts])

    def noted(self) -> dict[str, Any]:
        """The fields of a manifest."""
        return {name: getattr(self, name) for name in ("run", "attempt", "base", "data", "flags", "versions")}


def identify(args: Arguments, base: Checkpoint, data_files: Sequence[Path]) -> RunIdentity:
    """The identity of a run that is about to start.

    Raises:
        CheckpointError: the weights of the base cannot be read.
    """
    return RunIdentity(base=base_of(base), data=data_of(data_files), flags=flags_of(args), versions=versions())


def base_of(base: Checkpoint) -> dict[str, Any]:
    """Name and family of a base, and a digest of what its folder says: config and the headers of its weights.

    Weights of the same shapes are told apart by a piece of each file beside its header.
    """
    digest = hashlib.sha256()
    described = [base.folder / name for name in _DESCRIBED if (base.folder / name).is_file()]
    for path in sorted([*base.folder.glob("*.safetensors"), *described]):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        try:
            with path.open("rb") as file:
                if path.suffix == ".safetensors":
                    _update_with_header(digest, file)
                    _update_with_pieces(digest, file, path.stat().st_size)
                else:
                    digest.update(file.read())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return {"name": base.name, "revision": base.revision, "family": base.family.name, "digest": digest.hexdigest()}


def data_of(files: Iterable[Path]) -> dict[str, Any]:
    """Size and a digest of some pieces of every data file, by its name; files that are not there are left out."""
    found = {}
    for path in files:
        try:
            size = path.stat().st_size
            digest = hashlib.sha256()
            with path.open("rb") as file:
                _update_with_pieces(digest, file, size)
        except OSError:
            continue  # whoever opens it for its records says so
        found[path.name] = {"bytes": size, "digest": digest.hexdigest()}
    return {"files": found}


def flags_of(args: Arguments) -> dict[str, Any]:
    """Every flag at its resolved value, by name, as it comes back from JSON."""
    groups = (args.model, args.data, args.training, args.lora)
    named = ((entry.name, getattr(group, entry.name)) for group in groups for entry in fields(group))
    return {name: json.loads(json.dumps(value, default=str)) for name, value in named if name not in _NOT_NOTED}


def versions() -> dict[str, str]:
    """Versions of this project and of the libraries that decide what is computed."""
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


def _update_with_pieces(digest: Any, file: BinaryIO, size: int) -> None:
    last = max(size - _PIECE, 0)
    for number in range(_PIECES):
        file.seek(last * number // (_PIECES - 1))
        digest.update(file.read(_PIECE))
        if not last:
            return
