"""Side files of results (run.yaml, config, tokenizer, processor, model card), so that they load like official ones."""

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
from finetune.checkpoints.base_checkpoint import (
    FULL_FILES,
    SIDE_FILES,
    BaseCheckpoint,
    copy_base_files,
    read_config,
)
from finetune.checkpoints.model_card import adapter_card, full_card, with_code_note
from finetune.checkpoints.passthrough_tensors import copy_passthrough_tensors
from finetune.families.settings import DOWNSAMPLE_MODE
from finetune.model_folders.duplex_prompt import recorded_as
from finetune.model_folders.output_contents import RUN_FILE

# Weights of a previous result, which are removed before a new one is moved into place.
_WEIGHT_FILES = ("adapter_model.safetensors", "model*.safetensors", "model.safetensors.index.json")


def write_run(args: Arguments, base: BaseCheckpoint, folder: Path) -> None:
    """Writes run.yaml, with which finetune.py repeats the run: non-default flags, base checkpoint, versions."""
    described: dict[str, Any] = {"name": base.name, "revision": base.revision, "family": base.family.name}
    if base.mode is not None:
        described[DOWNSAMPLE_MODE] = base.mode.name
        if base.mode.chosen:  # recorded as a flag: it may come from an environment variable
            model = replace(args.model, downsample_mode=base.mode.name)
            args = args._replace(model=model, origins={DOWNSAMPLE_MODE: base.mode.origin, **args.origins})
    if base.duplex is not None:
        described |= recorded_as()
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
    (folder / RUN_FILE).write_text(text, encoding="utf-8")


def finish_adapter(model: PeftModel, folder: Path, base: BaseCheckpoint) -> None:
    """Adds to a saved adapter what AutoPeftModel needs, the base, and tokenizer and processor files of the base."""
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = base.name
    config.revision = base.revision
    # peft imports the class named here; its allow-list has transformers, whose Auto classes know ours by registration.
    base_class, library = base.family.auto_mapping
    config.auto_mapping = {"base_model_class": base_class, "parent_library": library, **base.auto_mapping_extra}
    config.save_pretrained(str(folder))
    copy_base_files(base, folder, SIDE_FILES)
    (folder / "README.md").write_text(adapter_card(base), encoding="utf-8")
    _tidy(folder)


def finish_full(folder: Path, base: BaseCheckpoint) -> None:
    """Adds to a saved full model config.json, tokenizer, processor and code files of the base.

    Tensors of the base that the model does not build (the speech output of MiniCPM-o) are added to the weights.
    transformers 5 writes config.json in a layout that official code misreads (rope_theta moves), so the original is
    copied; only torch_dtype is set to that of the weights, downsample_mode and use_image_id to those of the run.
    """
    copy_base_files(base, folder, FULL_FILES)
    config = read_config(folder)
    dtype = _saved_dtype(folder)
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_passthrough_tensors(base.folder, folder)
    (folder / "README.md").write_text(with_code_note(full_card(base), folder), encoding="utf-8")
    _tidy(folder)


def move_result(unfinished: Path, folder: Path, ours: Container[str] = ()) -> None:
    """Moves a complete result to its folder; weights of a previous result are removed first.

    Args:
        unfinished: folder of the result; it is removed.
        folder: the target.
        ours: names of files there that runs of this toolkit have written; other files are kept.

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
    # A pickle; run.yaml has the same information.
    (folder / "training_args.bin").unlink(missing_ok=True)
    # safetensors writes files with mode 0600, regardless of the umask.
    readable = (folder / "README.md").stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(readable)
