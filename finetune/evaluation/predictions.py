"""predictions.jsonl: answers written as they are generated, so that an interrupted evaluation resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune.utils.errors import UserError

PREDICTIONS = "predictions.jsonl"
SETTINGS = "evaluation.json"
MAIN = "prediction"
"""Key of the model's answers; those of the model it is compared with have another."""


class Predictions:
    """The answers in a folder: rank 0 appends to predictions.jsonl, other ranks to files beside it.

    Construct it on every rank, then wait for all ranks, then add.

    Args:
        folder: output folder of the evaluation.
        rank: rank of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self._own = folder / (PREDICTIONS if rank == 0 else f"predictions.rank{rank}.jsonl")
        self._known: dict[tuple[int, str], str] = {}
        for path in self._files():
            for line in whole_lines(path):
                keys = [key for key in line if key == MAIN or key.startswith(f"{MAIN}_")]
                self._known.update({(line["index"], key): line[key] for key in keys})

    def _files(self) -> list[Path]:
        return [path for path in (self.folder / PREDICTIONS, *self._of_ranks()) if path.is_file()]

    def _of_ranks(self) -> list[Path]:
        return sorted(self.folder.glob("predictions.rank*.jsonl"))

    def missing(self, indices: Iterable[int], key: str = MAIN) -> list[int]:
        """The samples without an answer."""
        return [index for index in indices if (index, key) not in self._known]

    def add(self, indices: Sequence[int], texts: Sequence[str], key: str = MAIN) -> None:
        """Appends answers and flushes them to disk."""
        lines = ({"index": index, key: text} for index, text in zip(indices, texts, strict=True))
        with self._own.open("a", encoding="utf-8") as file:
            # An incomplete line of a killed run must not be joined with the next one.
            start = "\n" if file.tell() and not _ends_well(self._own) else ""
            file.write(start + "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def collect(self, indices: Sequence[int], key: str = MAIN) -> list[str]:
        """The answers of all ranks to these samples, read from disk."""
        everything = Predictions(self.folder)._known
        return [everything[index, key] for index in indices]

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replaces the partial files of all ranks by the final predictions.jsonl."""
        unfinished = self.folder / f".{PREDICTIONS}"
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        unfinished.replace(self.folder / PREDICTIONS)
        for path in self._of_ranks():
            path.unlink()


def start_folder(folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
    """Creates the folder of an evaluation, or checks that its contents have the same settings.

    Args:
        folder: output folder of the evaluation.
        settings: all settings that the answers depend on, in JSON types.
        overwrite: remove existing answers.

    Raises:
        UserError: the folder holds answers generated with other settings.
    """
    path = folder / SETTINGS
    held = sorted(folder.glob("predictions*.jsonl"))
    if overwrite:
        for file in held:
            file.unlink()
    elif held:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        differing = [
            f"{key} was {before.get(key)!r} and is {value!r}"
            for key, value in settings.items()
            if before.get(key) != value
        ]
        if differing:
            raise UserError(
                f"{folder} holds the answers of another evaluation ({'; '.join(differing)}): give another --out, "
                "or --overwrite to start again"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(path: Path) -> str:
    """Fingerprint of a file (by contents) or of a model folder (by file names, sizes and modification times)."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    files = sorted(file for pattern in ("*.safetensors", "*.json", "*.bin") for file in path.glob(pattern))
    states = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(states).encode()).hexdigest()[:16]


def _ends_well(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; incomplete ones of a killed run are dropped."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and isinstance(value.get("index"), int):
            lines.append(value)
    return lines
