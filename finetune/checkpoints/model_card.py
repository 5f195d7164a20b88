"""README.md of results, the model card of the hub: base, how it loads, what it was trained on and what came out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.arguments.parse import DERIVED
from finetune.checkpoints.base_checkpoint import BaseCheckpoint, changes_note
from finetune.families.settings import DOWNSAMPLE_MODE
from finetune.model_folders.image_ids import USE_IMAGE_ID
from finetune.utils.number_format import significant

_HEADING = "\n## Training\n"
_WORDS = {
    "samples": "training samples",
    "steps": "optimizer steps",
    "train_loss": "training loss",
    "eval_loss": "evaluation loss",
}
# Flags that name a place on this machine, or the account; run.yaml has them.
_LEFT_OUT = ("_path", "_dir", "_root", "dataset", "deepspeed", "hub_", "push_to_hub", "report_to", "run_name")


def adapter_card(base: BaseCheckpoint) -> str:
    """README.md of an adapter: its base and how it loads."""
    revision = f" (revision {base.revision})" if base.revision else ""
    option = note = ""
    if base.mode is not None and base.mode.name != base.mode.base:
        option = f'model.config.{DOWNSAMPLE_MODE} = "{base.mode.name}"\n'
        note = f"""
It was trained with {DOWNSAMPLE_MODE} {base.mode.name}, and the base has {base.mode.base}. The processor beside the
adapter and the tools of this project use its mode; with peft, set it on the model as above.
"""
    if base.image_ids is not None and base.image_ids.changed:
        note += f"""
It was trained with {USE_IMAGE_ID} {str(base.image_ids.used).lower()}, and the base has
{str(base.image_ids.base).lower()}. The processor beside the adapter, `model.chat` and the tools of this project do as
it was trained; other code must be given the processor of this folder.
"""
    return f"""---
{_base_line(base)}library_name: peft
---
# LoRA adapter for {base.family.title}

Base checkpoint: `{base.name}`{revision}. The flags of the run are in `run.yaml`.

```python
import finetune.models  # registers the model classes; no remote code is run
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("path/to/this/folder", device_map="auto").eval()
{option}```
{note}"""


def full_card(base: BaseCheckpoint) -> str:
    """README.md of a full model: what it was made of and how it loads."""
    return f"""---
{_base_line(base)}library_name: transformers
---
# Finetuned {base.family.title}

All files besides the weights are those of `{base.name}`{changes_note(base)}. The flags of the run are in `run.yaml`.

```python
import finetune.models  # registers the model classes; no remote code is run
from transformers import {base.family.auto_mapping[0]}

model = {base.family.auto_mapping[0]}.from_pretrained("path/to/this/folder", device_map="auto").eval()
```
"""


def code_note(folder: Path) -> str | None:
    """What keeps the code files of a model folder from running with torch 2.13 and later; None if nothing does.

    The published resampler.py of 2.6 takes ``List`` from a star import of torch that no longer has it.
    """
    resampler = folder / "resampler.py"
    if not resampler.is_file():
        return None
    code = resampler.read_text(encoding="utf-8", errors="replace")
    if not re.search(r"\bList\[", code) or re.search(r"^.*\bimport\b.*\bList\b", code, flags=re.MULTILINE):
        return None
    return (
        "resampler.py uses List without importing it, which is an error with torch 2.13 and later: to load this folder "
        "in the published code, put `from typing import List` at the top of that file"
    )


def with_code_note(card: str, folder: Path) -> str:
    """A model card with ``code_note`` about the code files of a folder, where there is one."""
    note = code_note(folder)
    return card if note is None else f"{card}\n{note[0].upper()}{note[1:]}.\n"


def _base_line(base: BaseCheckpoint) -> str:
    """The base as the hub's metadata have it: a hub id; a folder of this machine is none."""
    return f"base_model: {base.name}\n" if base.revision else ""


def add_training(readme: Path, flags: Sequence[tuple[str, Any, str]], figures: Mapping[str, Any]) -> None:
    """Adds the section about the training to a model card, in place of a former one.

    Args:
        readme: the card.
        flags: (name, value, origin) of the flags that are not at their default; derived ones are left out.
        figures: the values of the ``result=`` line, and ``samples``.
    """
    rows = [(words, figures[name]) for name, words in _WORDS.items() if figures.get(name) is not None]
    set_flags = [
        (f"`{name}`", value)
        for name, value, origin in flags
        if origin != DERIVED and not any(part in name for part in _LEFT_OUT)
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {_shown(value)} |" for name, value in [*rows, *set_flags])]
    text = readme.read_text(encoding="utf-8").partition(_HEADING)[0]
    unfinished = readme.with_name(f"{readme.name}.tmp")
    unfinished.write_text(text + _HEADING + "\n" + "\n".join(lines) + "\n", encoding="utf-8")
    unfinished.replace(readme)


def _shown(value: Any) -> str:
    text = significant(value) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
