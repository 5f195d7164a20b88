"""A command line of training, looked at before any process is started: flags, model folder and the first records.

No torch is imported: what is wrong is said once, in well under a second, instead of by every rank after its start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.arguments.early_flags import early_flags
from finetune.utils.errors import ArgumentError
from finetune.utils.paths import expand

# Most bytes of a data file whose records are looked at here; a larger one is indexed when training starts.
_LARGE_FILE = 64 * 2**20


def check_early(argv: Sequence[str]) -> None:
    """Checks what can be checked without a model and without torch.

    Args:
        argv: ``[FILE.yaml] --flag value ...``, as finetune.py takes it.

    Raises:
        UserError: a wrong flag or value; a model folder that is missing or of no known generation; a data file that is
            missing, malformed, or whose records have no known form.
    """
    flags = early_flags(argv)
    if (model := flags.get("model_name_or_path")) is None:
        raise ArgumentError("--model_name_or_path is missing: a checkpoint folder or a hub id")
    _check_model(model[0])
    for name in ("data_path", "eval_data_path"):
        if name in flags:
            _check_data(f"--{name}", Path(flags[name][0]), flags)
    if "data_path" not in flags and "dataset" not in flags:
        raise ArgumentError("--data_path is missing: a data file (or --dataset NAME of dataset_info.json)")


def _check_model(name: str) -> None:
    from finetune.families import detect
    from finetune.model_folders.checkpoint_folder import CONFIG, existing_folder, is_adapter
    from finetune.utils.json_objects import read_object

    folder = existing_folder(name)
    if folder is not None and not is_adapter(folder) and (folder / CONFIG).is_file():
        detect(read_object(folder / CONFIG))


def _check_data(flag: str, path: Path, flags: Mapping[str, Sequence[str]]) -> None:
    from finetune.data_files.records import open_records
    from finetune.readers.form_detection import choose, some_records

    file = expand(path)
    if not file.exists():
        raise ArgumentError(f"{flag} {path}: no such file (looked in {Path.cwd()})")
    if file.is_file() and file.stat().st_size <= _LARGE_FILE:
        form = flags.get("data_format", ["auto"])[0]
        choose(some_records(open_records(file)), str(path), form)  # pyright: ignore[reportArgumentType]
