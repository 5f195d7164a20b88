"""``python -m finetune restore-template DIR``: restores the published chat template of 2.5.

The old finetuning scripts of MiniCPM-Llama3-V 2.5 saved their training template in place of the published one, so that
their checkpoints are prompted differently at inference. Checkpoints trained by this project never need it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from finetune.commands.parser import CommandParser
from finetune.families import detect
from finetune.families.family import Family
from finetune.utils.errors import ArgumentError, CheckpointError
from finetune.utils.json_objects import read_object
from finetune.utils.paths import expand

_SETTINGS = "tokenizer_config.json"
# Newer versions of transformers write the template here, and read it from here first.
_BESIDE = "chat_template.jinja"


def main(argv: list[str]) -> int:
    """Restores the template and checks the prompt; the previous files are kept with the suffix .bak."""
    folder = expand(build_parser().parse_args(argv).folder)

    from finetune.encoding.chat_template_check import check_chat_template
    from finetune.tokenizers.tokenization import load_tokenizer

    family = _family(folder)
    if not family.inference_template:
        raise ArgumentError(
            f"{folder} is {family.title}: only the scripts of MiniCPM-Llama3-V 2.5 saved another template, "
            "there is nothing to restore"
        )
    backups = restore(folder, family.inference_template)
    check_chat_template(family, load_tokenizer(folder))
    if backups:
        print(f"restored the chat template of {folder}; backups: {', '.join(path.name for path in backups)}")
    else:
        print(f"{folder} has the published chat template already; nothing changed")
    return 0


def restore(folder: Path, template: str) -> list[Path]:
    """Writes the template into tokenizer_config.json, and moves another template file beside it to a backup.

    Returns:
        The backups made, empty when nothing had to change.

    Raises:
        CheckpointError: tokenizer_config.json is missing or not JSON.
    """
    file, beside = folder / _SETTINGS, folder / _BESIDE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {_SETTINGS}; give the folder of a checkpoint or an adapter")
    settings = read_object(file)
    backups = []
    if settings.get("chat_template") != template:
        backups.append(_free(file))
        backups[-1].write_bytes(file.read_bytes())
        settings["chat_template"] = template
        # Atomic replacement: an interruption leaves the old file or the new one.
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, file)
    if beside.is_file() and beside.read_text(encoding="utf-8") != template:
        backups.append(_free(beside))
        beside.rename(backups[-1])
    return backups


def _family(folder: Path) -> Family:
    """The family of a checkpoint, or of the base of an adapter."""
    from finetune.model_folders.checkpoint_folder import CONFIG, is_adapter

    if (folder / CONFIG).is_file():
        return detect(read_object(folder / CONFIG))
    if not is_adapter(folder):
        raise CheckpointError(f"{folder} is neither a checkpoint (config.json) nor an adapter (adapter_config.json)")
    from finetune.models import base_of

    return detect(read_object(base_of(folder) / CONFIG))


def _free(file: Path) -> Path:
    """An unused name for a backup."""
    first = file.with_name(f"{file.name}.bak")
    later = (file.with_name(f"{file.name}.bak{number}") for number in range(2, 1000))
    return first if not first.exists() else next(path for path in later if not path.exists())


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m finetune restore-template", description=__doc__)
    parser.add_argument("folder", type=Path, help="full checkpoint or adapter, trained by the old scripts")
    return parser
