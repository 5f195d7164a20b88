"""What is written beside the trained weights, so that a result loads anywhere the official checkpoints load."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors import safe_open

import finetune
from finetune.arguments.parse import Arguments
from finetune.checkpoints.base_checkpoint import FULL_FILES, SIDE_FILES, Checkpoint, but_mode, read_config, take_over
from finetune.checkpoints.passthrough_tensors import carry
from finetune.families.settings import DOWNSAMPLE_MODE

# Weights of a former result, which must not stay beside those of a new one.
_WEIGHT_FILES = ("adapter_model.safetensors", "model*.safetensors", "model.safetensors.index.json")


def write_run(args: Arguments, base: Checkpoint, folder: Path) -> None:
    """Writes run.yaml, which finetune.py runs again: flags that differ from their defaults, the base, the versions."""
    described: dict[str, Any] = {"name": base.name, "revision": base.revision, "family": base.family.name}
    if base.mode is not None:
        described[DOWNSAMPLE_MODE] = base.mode.name
        if base.mode.chosen:  # also by the environment: the run that this file starts again need not have it
            model = replace(args.model, downsample_mode=base.mode.name)
            args = args._replace(model=model, origins={DOWNSAMPLE_MODE: base.mode.origin, **args.origins})
    run = {
        "base": described,
        "versions": {
            "finetune": finetune.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
    text = args.to_yaml() + yaml.safe_dump(run, sort_keys=False, allow_unicode=True)
    (folder / "run.yaml").write_text(text, encoding="utf-8")


def finish_adapter(model: PeftModel, folder: Path, base: Checkpoint) -> None:
    """Completes a saved adapter: loadable by AutoPeftModel, base recorded, tokenizer and processor of the base."""
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = base.name
    config.revision = base.revision
    # peft imports the class named here; its allow-list has transformers, which our registration then serves.
    base_class, library = base.family.auto_mapping
    config.auto_mapping = {"base_model_class": base_class, "parent_library": library, **base.mark}
    config.save_pretrained(str(folder))
    take_over(base, folder, SIDE_FILES)
    (folder / "README.md").write_text(_adapter_card(base), encoding="utf-8")
    _tidy(folder)


def finish_full(folder: Path, base: Checkpoint) -> None:
    """Completes a saved full model: the base's own config.json, tokenizer, processor and code files.

    Tensors of the base that the network does not have (the speech output of MiniCPM-o) are added to the weights.
    transformers 5 re-serialises config.json in a layout that official code misreads (rope_theta moves), so the
    original goes back; only torch_dtype follows the weights, and downsample_mode the run.
    """
    take_over(base, folder, FULL_FILES)
    config = read_config(folder)
    dtype = _saved_dtype(folder)
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    carry(base.folder, folder)
    (folder / "README.md").write_text(_full_card(base), encoding="utf-8")
    _tidy(folder)


def put_in_place(unfinished: Path, folder: Path, ours: Container[str] = ()) -> None:
    """Moves a result that is complete to where it belongs; weights of a former one go first.

    Args:
        unfinished: the result, in a folder of its own, which goes when it is empty.
        folder: where it belongs.
        ours: names there that runs of this toolkit have written; other files are left alone.

    Raises:
        OSError: it cannot be moved.
    """
    for path in [path for pattern in _WEIGHT_FILES for path in folder.glob(pattern) if path.name in ours]:
        path.unlink()
    for path in sorted(unfinished.iterdir()):
        target = folder / path.name
        if path.is_dir() and target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    unfinished.rmdir()
    if not any(unfinished.parent.iterdir()):
        unfinished.parent.rmdir()


def _saved_dtype(folder: Path) -> str | None:
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                return names.get(file.get_slice(key).get_dtype())
    return None


def _tidy(folder: Path) -> None:
    # A pickle; run.yaml says the same in plain text.
    (folder / "training_args.bin").unlink(missing_ok=True)
    # safetensors writes files that only their owner may read, whatever the umask.
    readable = (folder / "README.md").stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(readable)


def _adapter_card(base: Checkpoint) -> str:
    revision = f" (revision {base.revision})" if base.revision else ""
    option = note = ""
    if base.mode is not None and base.mode.name != base.mode.base:
        option = f'model.config.{DOWNSAMPLE_MODE} = "{base.mode.name}"\n'
        note = f"""
It was trained with {DOWNSAMPLE_MODE} {base.mode.name}, and the base has {base.mode.base}. The processor beside the
adapter and the tools of this project know; peft loads the base as it is and has to be told, as above.
"""
    return f"""---
base_model: {base.name}
library_name: peft
---
# LoRA adapter for {base.family.title}

Base checkpoint: `{base.name}`{revision}. The flags of the run are in `run.yaml`.

```python
import finetune.models  # registers the network; no remote code is run
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("path/to/this/folder", device_map="auto").eval()
{option}```
{note}"""


def _full_card(base: Checkpoint) -> str:
    return f"""---
base_model: {base.name}
---
# Finetuned {base.family.title}

All files besides the weights are those of `{base.name}`{but_mode(base)}. The flags of the run are in `run.yaml`.

```python
import finetune.models  # registers the network; no remote code is run
from transformers import {base.family.auto_mapping[0]}

model = {base.family.auto_mapping[0]}.from_pretrained("path/to/this/folder", device_map="auto").eval()
```
"""
