"""Checks a training command line before any process starts: flags, model and output folders, a few records per file.

No torch is imported: what is wrong is said once, in about a second, instead of by every rank after its start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.arguments.deepspeed import check_config_file
from finetune.arguments.early_flags import early_flags, values_of, without_warnings
from finetune.arguments.flag_rules import check_rules, resume_choice
from finetune.families.family import Family
from finetune.readers.record_reader import SampleFile
from finetune.sample import DataError
from finetune.templates.turn_order import turns
from finetune.utils.errors import ArgumentError, CheckpointError, located
from finetune.utils.paths import did_you_mean, expand

# Most bytes of a data file whose records are looked at here; a larger one is indexed when training starts.
_LARGE_FILE = 64 * 2**20
# Most records of a file that are read here, evenly spaced.
_LOOKED_AT = 500

Flags = Mapping[str, Any]


def check_early(argv: Sequence[str]) -> None:
    """Checks what can be checked without a model and without torch.

    Args:
        argv: ``[FILE.yaml] --flag value ...``, as finetune.py takes it.

    Raises:
        UserError: a wrong flag or value; flags that contradict each other; a model folder that is missing or of no
            known generation; an output folder that is not empty; a data file that is missing, malformed, or whose
            records cannot be read.
    """
    with without_warnings():
        flags = values_of(early_flags(argv))
        if flags.get("model_name_or_path") is None:
            raise ArgumentError("--model_name_or_path is missing: a checkpoint folder or a hub id")
        check_rules(flags)
        if "deepspeed" in flags:
            check_config_file(flags["deepspeed"])
        family = _check_model(flags["model_name_or_path"], use_lora=bool(flags.get("use_lora")))
        _check_output(flags)
        for name in ("data_path", "eval_data_path"):
            if name in flags:
                _check_file(f"--{name}", Path(flags[name]), flags, family)
        for name in ("dataset", "eval_dataset"):
            if name in flags:
                _check_named(flags[name], flags, family)


def _check_model(name: str, *, use_lora: bool) -> Family | None:
    """Checks a local model folder, but not the values of its files; returns its generation."""
    from finetune.families import detect
    from finetune.model_folders.checkpoint_folder import (
        CONFIG,
        existing_folder,
        refuse_adapter,
        refuse_uncached_offline,
        weight_files,
    )
    from finetune.model_folders.stored_4bit import check_adapters_only, stored_in_4bit
    from finetune.utils.json_objects import read_object

    folder = existing_folder(name)
    if folder is None:
        refuse_uncached_offline(name)
        return None
    refuse_adapter(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; it is not a model folder")
    family = detect(config := read_object(folder / CONFIG))
    weight_files(folder)
    if stored_in_4bit(config):
        check_adapters_only(folder, family.hub_id, use_lora=use_lora)
    return family


def _check_output(flags: Flags) -> None:
    from finetune.model_folders.output_contents import as_output_error, check_unused

    folder = Path(flags.get("output_dir", "output")).absolute()
    resume = resume_choice(flags.get("resume_from_checkpoint"))
    if resume is None and not flags.get("overwrite_output_dir"):
        with as_output_error(folder):
            check_unused(folder)
    elif resume not in (None, "auto") and not expand(Path(resume)).is_dir():
        raise ArgumentError(
            f"--resume_from_checkpoint {resume}: no such folder; give OUTPUT_DIR/checkpoint-N, auto or none"
        )


def _check_file(flag: str, path: Path, flags: Flags, family: Family | None) -> None:
    from finetune.data_files.records import data_files, open_records
    from finetune.readers import read

    file = expand(path)
    if not file.exists():
        raise ArgumentError(f"{flag} {path}: no such file{did_you_mean(file)} (looked in {Path.cwd()})")
    if _size(data_files(file)) <= _LARGE_FILE:
        options = {
            name: flags[name] for name in ("image_root", "train_on", "data_format", "strict_paths") if name in flags
        }
        pairs = flags.get("stage") == "dpo"
        _check_records(read(file, records=open_records(file), pairs=pairs, **options), flags, family)


def _check_named(names: str, flags: Flags, family: Family | None) -> None:
    """Data sets of dataset_info.json; those of a hub are opened by the run."""
    from finetune.data_files.records import data_files
    from finetune.readers.dataset_info import find_entry, open_entry
    from finetune.readers.mixture import parse_names

    options = {name: flags[name] for name in ("media_dir", "image_root", "train_on", "strict_paths") if name in flags}
    options["pairs"] = flags.get("stage") == "dpo"
    for each in parse_names(names):
        entry = find_entry(each.name, flags.get("dataset_dir", "data"))
        if entry.file is not None and _size(data_files(entry.file)) <= _LARGE_FILE:
            _check_records(open_entry(entry, **options), flags, family)


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _check_records(file: SampleFile, flags: Flags, family: Family | None) -> None:
    """Reads records as training does, but for what only tokenizer and media can tell.

    Raises:
        DataError: some cannot be used, and neither --on_bad_sample nor --check lets them pass.
    """
    if flags.get("on_bad_sample", "error") != "error" or flags.get("check") == "off":
        return
    records = min(len(file), int(flags.get("max_samples") or len(file)))
    looked_at = min(records, _LOOKED_AT)
    numbers = (place * records // looked_at for place in range(looked_at))
    faults = [fault for number in numbers if (fault := _fault(file, number, family)) is not None]
    if faults:
        raise DataError(
            f"{len(faults)} of {looked_at} records looked at cannot be used, the first: {faults[0]} "
            "(`python -m finetune check` names all; --on_bad_sample skip skips such records)"
        )


def _fault(file: SampleFile, number: int, family: Family | None) -> DataError | None:
    try:
        sample = file[number]
        tools = sample.tools or any(message.calls for message in sample.messages)
        if family is not None and not tools:
            with located(sample.source):
                turns(sample, family.roles, generate=False, thinks=True)
    except DataError as error:
        return error
    return None
