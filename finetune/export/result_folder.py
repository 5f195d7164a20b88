"""A model folder that needs nothing else, put in its place only when it is complete."""

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

from finetune.checkpoints.base_checkpoint import FULL_FILES, Checkpoint, copy_base_files, mode_note, read_config
from finetune.export.sharded_writer import WeightFiles, check_room
from finetune.utils.errors import UserError
from finetune.utils.paths import expand

# Says what the folder was made of; also the sign that a folder is ours to replace.
RECORD = "export.yaml"
_TIES = "tie_word_embeddings"


class ExportError(UserError):
    """A folder that must not be written to, or settings that contradict each other."""


@contextmanager
def unfinished(target: Path, sources: Sequence[Path], *, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``target`` to write into; it takes the target's place at the end, or vanishes with an error.

    Args:
        target: the result; must not exist, or be empty, unless ``overwrite``.
        sources: folders that are read and that the result must therefore not replace or lie in.
        overwrite: replace a former result; only what is nothing but a model folder is ever removed.

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
        former = target.with_name(f".{target.name}.former-{os.getpid()}")
        if target.is_dir():
            target.rename(former)
        folder.rename(target)
        shutil.rmtree(former, ignore_errors=True)
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
            raise ExportError(f"--export_dir {target} holds {source}, which is read; choose another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ExportError(
            f"--export_dir {target} is not empty: choose another folder, or replace it with --overwrite_output_dir true"
        )
    ours, plain = (target / RECORD).is_file(), (target / "config.json").is_file()
    if not ours and not (plain and all(path.is_file() for path in target.iterdir())):
        raise ExportError(
            f"--export_dir {target} holds more than a model and is not replaced, not even with --overwrite_output_dir: "
            "choose another folder, or empty it yourself"
        )


def write_model(folder: Path, base: Checkpoint, files: WeightFiles, *, dtype: torch.dtype | None, card: str) -> int:
    """Writes a model folder: weights, config.json, tokenizer, processor and code files of the base, and a card.

    Args:
        folder: an empty folder.
        base: the checkpoint that everything but the weights and the downsample_mode comes from.
        files: the weights.
        dtype: recorded in config.json; None leaves what is there.
        card: text of README.md.

    Returns:
        Number of weight files.
    """
    check_room(folder, files.total_size)
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
    (folder / "README.md").write_text(card, encoding="utf-8")
    return files.write(folder)


def write_record(folder: Path, adapters: Sequence[Path], record: Mapping[str, Any]) -> None:
    """Writes export.yaml, and the flags with which the adapters were trained as training*.yaml."""
    (folder / RECORD).write_text(yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True), encoding="utf-8")
    for number, adapter in enumerate(adapters, 1):
        if (adapter / "run.yaml").is_file():
            name = "training.yaml" if len(adapters) == 1 else f"training-{number}.yaml"
            shutil.copyfile(adapter / "run.yaml", folder / name)


def model_card(base: Checkpoint, adapters: Sequence[str]) -> str:
    """README.md of a merged or copied model."""
    revision = f" (revision {base.revision})" if base.revision else ""
    parts = "".join(f"\n- adapter merged into it: `{name}`" for name in adapters)
    loader = base.family.auto_mapping[0]
    return f"""---
base_model: {base.name}
---
# {"Finetuned " if adapters else ""}{base.family.title}

- base: `{base.name}`{revision}{parts}

All files besides the weights are those of the base{mode_note(base)}. `{RECORD}` says how this folder was made.

```python
import finetune.models  # registers the network; no remote code is run
from transformers import {loader}

model = {loader}.from_pretrained("path/to/this/folder", device_map="auto").eval()
```
"""


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
