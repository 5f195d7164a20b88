"""Writes an exported model folder to a temporary folder and moves it into place when it is complete."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.checkpoints.base_checkpoint import FULL_FILES, BaseCheckpoint, changes_note, copy_base_files, read_config
from finetune.checkpoints.model_card import with_code_note
from finetune.export.sharded_writer import WeightFiles, check_export_space
from finetune.model_folders.output_contents import RUN_FILE
from finetune.utils.errors import UserError
from finetune.utils.malloc import return_freed_memory
from finetune.utils.paths import expand

# File with the sources of an export; a folder that has it may be replaced.
RECORD = "export.yaml"
_TIES = "tie_word_embeddings"


class ExportError(UserError):
    """A folder that must not be written to, or settings that contradict each other."""


@contextmanager
def unfinished(target: Path, sources: Sequence[Path], *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``target``, which replaces the target at the end, or is removed on an error.

    Args:
        target: the result; must not exist, or be empty, unless ``overwrite``.
        sources: folders that are read, which the result must not replace or contain.
        overwrite: replace a previous result; only a folder that is nothing but a model is ever removed.

    Raises:
        ExportError: the target must not be written to.
    """
    target = expand(target).absolute()
    check_target(target, sources, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        previous = target.with_name(f".{target.name}.former-{os.getpid()}")
        if target.is_dir():
            target.rename(previous)
        folder.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """As ``unfinished``, before anything is read.

    Raises:
        ExportError: the target must not be written to.
    """
    if target.is_file():
        raise ExportError(f"--export_dir {target} is a file; give a folder")
    for source in sources:
        if target == source or target in source.parents:
            raise ExportError(f"--export_dir {target} contains {source}, which is read; choose another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ExportError(
            f"--export_dir {target} is not empty: choose another folder, or replace it with --overwrite_output_dir true"
        )
    ours, plain = (target / RECORD).is_file(), (target / "config.json").is_file()
    if not ours and not (plain and all(path.is_file() for path in target.iterdir())):
        raise ExportError(
            f"--export_dir {target} contains more than a model and is not replaced, not even with "
            "--overwrite_output_dir: choose another folder, or empty it yourself"
        )


def write_model(folder: Path, base: BaseCheckpoint, files: WeightFiles, *, dtype: torch.dtype | None, card: str) -> int:
    """Writes a model folder: weights, config.json, tokenizer, processor and code files of the base, and a card.

    The weights are written one by one, and the process returns the memory of each (``return_freed_memory``).

    Args:
        folder: an empty folder.
        base: the checkpoint; everything but the weights, downsample_mode and use_image_id is copied from it.
        files: the weights.
        dtype: recorded in config.json; None keeps the value of the base.
        card: text of README.md.

    Returns:
        Number of weight files.
    """
    check_export_space(folder, files.total_size)
    return_freed_memory()
    copy_base_files(base, folder, FULL_FILES)
    config = read_config(folder)
    before = copy.deepcopy(config)
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    if files.weights.untied:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part is config or _TIES in part:
                part[_TIES] = False
    if config != before:
        _write_json(folder / "config.json", config)
    (folder / "README.md").write_text(with_code_note(card, folder), encoding="utf-8")
    return files.write(folder)


def write_record(folder: Path, adapters: Sequence[Path], record: Mapping[str, Any]) -> None:
    """Writes export.yaml, and copies run.yaml of the adapters as training*.yaml."""
    (folder / RECORD).write_text(yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True), encoding="utf-8")
    for number, adapter in enumerate(adapters, 1):
        if (adapter / RUN_FILE).is_file():
            name = "training.yaml" if len(adapters) == 1 else f"training-{number}.yaml"
            shutil.copyfile(adapter / RUN_FILE, folder / name)


def model_card(base: BaseCheckpoint, adapters: Sequence[str]) -> str:
    """README.md of a merged or copied model."""
    revision = f" (revision {base.revision})" if base.revision else ""
    parts = "".join(f"\n- adapter merged into it: `{name}`" for name in adapters)
    loader = base.family.auto_mapping[0]
    return f"""---
base_model: {base.name}
---
# {"Finetuned " if adapters else ""}{base.family.title}

- base: `{base.name}`{revision}{parts}

All files besides the weights are those of the base{changes_note(base)}. `{RECORD}` has the sources of this folder.

```python
import finetune.models  # registers the model classes; no remote code is run
from transformers import {loader}

model = {loader}.from_pretrained("path/to/this/folder", device_map="auto").eval()
```
"""


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
