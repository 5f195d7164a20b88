"""Data sets by name (``--dataset``): entries of LLaMA-Factory's ``dataset_info.json``, of files or of the hub."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.data_files.json_values import ValueFault, json_type, parse, written
from finetune.data_files.records import choose_split, folders_of, is_pattern, open_records, take_split
from finetune.data_files.tables import TableRecords, undecoded
from finetune.readers.answer_pairs import Comparison
from finetune.readers.conversation import TrainOn
from finetune.readers.form_detection import better_records, check_columns, choose, some_records, vocabulary
from finetune.readers.forms import (
    COLUMN_NAMES,
    FORMS,
    RANKING,
    ROLE_CONTENT,
    TAG_NAMES,
    Columns,
    Form,
    FormName,
    named_columns,
    named_tags,
)
from finetune.readers.record_media import media_folders
from finetune.readers.record_reader import RecordReader, SampleFile
from finetune.sample import DataError
from finetune.utils.quoting import reason, shown, truncate_middle

logger = logging.getLogger(__name__)

INFO = "dataset_info.json"

_ELSEWHERE = {
    "ms_hub_url": "data sets of ModelScope are not fetched",
    "om_hub_url": "data sets of openMind are not fetched",
    "script_url": "loading scripts are not run",
    "cloud_file_name": "files in a cloud are not fetched",
}
_PLACES = ("file_name", "hf_hub_url", *_ELSEWHERE)
_KEYS = (*_PLACES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")


@dataclass(frozen=True, slots=True)
class Entry:
    """A validated entry of ``dataset_info.json``.

    Attributes:
        name: its key.
        info: path of ``dataset_info.json``, for errors.
        file: its data file or folder; None for a hub data set.
        hub: its id on the Hugging Face hub.
        formatting: the format; None if not given.
        columns: the columns; None if not given.
        tags: the tags; None if not given.
        subset: subset of a hub data set.
        folder: folder of a hub data set.
        split: such as ``train`` or ``train[:10%]``.
        num_samples: number of randomly sampled records; more than there are repeats some.
        ranking: whether it is described as preference pairs.
    """

    name: str
    info: Path
    file: Path | None
    hub: str | None
    formatting: FormName | None
    columns: Mapping[str, str | None] | None
    tags: Mapping[str, str | None] | None
    subset: str | None
    folder: str | None
    split: str
    num_samples: int | None
    ranking: bool = False

    @property
    def where(self) -> str:
        """Its name for errors."""
        return f"{self.info}, data set {self.name!r}"


def load_info(dataset_dir: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path of ``dataset_info.json`` and the entries in it.

    Raises:
        DataError: it is missing or not a JSON object.
    """
    if str(dataset_dir) == "ONLINE" or str(dataset_dir).startswith("REMOTE:"):
        raise DataError(
            f"--dataset_dir {dataset_dir}: descriptions are not fetched from a hub; write a {INFO} with an hf_hub_url "
            "into a folder and give the folder"
        )
    path = Path(dataset_dir) / INFO
    try:
        entries = parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file (looked from {Path.cwd()}); --dataset names data sets that are described there: "
            f"give the folder of {INFO} as --dataset_dir, or a data file as --data_path"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except ValueFault as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path}: is {json_type(entries)}; it must be an object from names to descriptions")
    return path, entries


def find_entry(name: str, dataset_dir: str | Path) -> Entry:
    """The entry of a data set.

    Raises:
        DataError: no such entry, or an invalid one.
    """
    path, entries = load_info(dataset_dir)
    if name not in entries:
        close = difflib.get_close_matches(name, entries, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(sorted(entries)) or "none"
        raise DataError(f"{path}: no data set {name!r} is registered; {hint}Registered are: {known}")
    return _entry(name, path, entries[name])


def _entry(name: str, info: Path, given: Any) -> Entry:
    where = f"{info}, data set {name!r}"
    if not isinstance(given, dict):
        raise DataError(f"{where}: is {json_type(given)}; it must be an object with 'file_name'")
    _check_keys(given, _KEYS, where, "key")
    columns = _string_map(given, "columns", (*COLUMN_NAMES, *RANKING), where)
    tags = _string_map(given, "tags", TAG_NAMES, where)
    if columns and columns.get("kto_tag"):
        raise DataError(f"{where}: columns has kto_tag: answers with a tag are not read; pairs are (--stage dpo)")
    formatting = given.get("formatting")
    if formatting not in (None, *FORMS):
        raise DataError(f"{where}: 'formatting' is {written(formatting)}; there are {', '.join(FORMS)}")
    if formatting is None and columns is not None:
        if columns.get("messages"):
            raise DataError(
                f"{where}: columns has 'messages', and without 'formatting' the data set is alpaca; add "
                '"formatting": "sharegpt"'
            )
        formatting = "alpaca"
    file, hub = _place(given, info, where)
    for key in ("subset", "folder"):
        if hub is None and given.get(key):
            logger.warning("%s: %r has no effect on a file", where, key)
    number = given.get("num_samples")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise DataError(f"{where}: 'num_samples' is {written(number)}; it must be a number of records, at least 1")
    texts = {key: _text(given, key, where) for key in ("subset", "folder", "split")}
    split = texts["split"] or "train"
    if file is not None:
        file, split = choose_split(file, split, where)
    ranking = bool(given.get("ranking") or any(columns and columns.get(key) for key in RANKING))
    places_of = (texts["subset"], texts["folder"], split, number)
    return Entry(name, info, file, hub, formatting, columns, tags, *places_of, ranking)


def _place(given: Mapping[str, Any], info: Path, where: str) -> tuple[Path | None, str | None]:
    """The file, or the hub id, which has priority as in LLaMA-Factory."""
    hub = _text(given, "hf_hub_url", where)
    if hub is not None:
        return None, hub
    foreign = next((key for key in _ELSEWHERE if given.get(key) is not None), None)
    if foreign is not None:
        raise DataError(
            f"{where}: is at {foreign}, and {_ELSEWHERE[foreign]}; download it and give its file under 'file_name'"
        )
    file = _text(given, "file_name", where)
    if file is None:
        raise DataError(f"{where}: has no 'file_name'; give the file or folder, relative to {info.parent}")
    path = info.parent / file
    if not Path(file).is_absolute() and os.path.relpath(path, info.parent).split(os.sep)[0] == os.pardir:
        raise DataError(
            f"{where}: file_name {shown(file)} leaves the folder {info.parent.absolute()}; move the file there, or "
            "write its whole path if it is meant"
        )
    if is_pattern(path):
        return path, None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        looked = truncate_middle(str(path.absolute()))
        raise DataError(f"{where}: file_name {shown(file)} does not exist (looked for {looked}); correct it") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: file_name {shown(file)} cannot be reached ({reason(error)}); correct it") from error
    return path, None


def _check_keys(given: Collection[str], known: Sequence[str], where: str, what: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(f"{where}: unknown {what} {key!r}; {hint}Known are {', '.join(known)}")


def _string_map(given: Mapping[str, Any], key: str, known: Sequence[str], where: str) -> dict[str, str | None] | None:
    """``columns`` or ``tags``: an object from known names to strings."""
    values = given.get(key)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise DataError(f"{where}: {key!r} is {json_type(values)}; it must be an object from names to strings")
    _check_keys(values, known, f"{where}, {key}", "name")
    for name, value in values.items():
        if value is not None and (not isinstance(value, str) or not value):
            raise DataError(f"{where}, {key}: {name!r} is {written(value)}; it must be a string")
    used = [value for value in values.values() if value is not None]
    twice = sorted({value for value in used if used.count(value) > 1})
    if twice:
        raise DataError(f"{where}, {key}: {twice[0]!r} is used twice; use each name once")
    return values


def _text(given: Mapping[str, Any], key: str, where: str) -> str | None:
    value = given.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise DataError(f"{where}: {key!r} is {written(value)}; it must be a string")
    return value


def open_entry(
    entry: Entry,
    *,
    media_dir: str | Path | None = None,
    image_root: str | Path | None = None,
    train_on: TrainOn = "all",
    rebuild: bool = False,
    strict_paths: bool = False,
    pairs: bool = False,
    records: Sequence[Any] | None = None,
) -> SampleFile:
    """The samples of a registered data set; ``num_samples`` is not applied yet.

    Args:
        entry: its entry.
        media_dir: first base folder of media paths; the folder of ``dataset_info.json`` by default.
        image_root: another base folder.
        train_on: one of TRAIN_ON.
        rebuild: rebuild the index of its file.
        strict_paths: refuse media outside of these folders and the folder of its data file, which must be in the folder
            of ``dataset_info.json``.
        pairs: read preference pairs, instead of conversations.
        records: records of its file that are already open.

    Raises:
        DataError: its file cannot be read, or its records do not match the entry.
    """
    if entry.ranking and not pairs:
        raise DataError(
            f"{entry.where}: is preference data (ranking), which --stage dpo trains on; for supervised finetuning name "
            "one column of answers (response, or messages)"
        )
    if strict_paths:
        _check_inside(entry)
    records = _records_of(entry, rebuild=rebuild) if records is None else records
    path: str | Path = entry.hub or "" if entry.file is None else entry.file
    beside = [] if entry.file is None else folders_of(entry.file)[: 1 if strict_paths else None]
    first = some_records(records)
    names = _comparison(entry) if pairs else None
    form, why = _form(entry, first, names)
    logger.info("data set %s: %d records of %s in the %s format (%s)", entry.name, len(records), path, form.name, why)
    where = media_folders(media_dir or entry.info.parent, *beside, image_root, flag="--media_dir", strict=strict_paths)
    return SampleFile(records, path, RecordReader(form, where, train_on, names), entry.name)


def _records_of(entry: Entry, *, rebuild: bool) -> Sequence[Any]:
    """The records of the entry's file, or of its data set on the hub."""
    if entry.file is None:
        return TableRecords(load_hub(entry), entry.hub or "")
    return take_split(open_records(entry.file, rebuild=rebuild), entry.split, entry.where)


def _check_inside(entry: Entry) -> None:
    """Refuses a file outside of the folder of ``dataset_info.json``.

    Raises:
        DataError: with both.
    """
    folder = entry.info.parent.resolve()
    if entry.file is not None and not entry.file.resolve().is_relative_to(folder):
        raise DataError(
            f"{entry.where}: its file is {truncate_middle(str(entry.file.resolve()))}, outside of {folder}, which "
            "--strict_paths refuses; move it there"
        )


def _comparison(entry: Entry) -> Comparison:
    """The keys of both answers of the pairs of an entry."""
    given = entry.columns or {}
    names = {name: given[name] for name in ("chosen", "rejected", "messages", "response") if given.get(name)}
    return Comparison(**names)  # pyright: ignore[reportArgumentType]


def _form(entry: Entry, first: Sequence[Any], names: Comparison | None) -> tuple[Form, str]:
    """The format of the entry; what it does not give is detected from the records."""
    formatting, why = entry.formatting, f"as {INFO} says"
    if formatting is None:
        form, why = choose(first, entry.where, pairs=names is not None)
        if form.name != "alpaca":
            return form if entry.tags is None else replace(form, tags=named_tags(entry.tags)), why
        formatting = "alpaca"
    if formatting in ("official", "duplex"):
        return Form(formatting), why
    objects = [record for record in first if isinstance(record, dict)]
    columns = Columns() if entry.columns is None else named_columns(entry.columns)
    if names is not None:
        first = objects = better_records(objects, names, entry.where)
        columns = replace(columns, response=names.response)
    if columns.messages is None and formatting != "alpaca":
        raise DataError(
            f"{entry.where}: columns does not name the turns (once columns are named, the others do not exist); "
            'add "messages": "conversations", or the key that the records have'
        )
    if formatting == "openai" and entry.columns is None and not any("conversations" in each for each in objects):
        columns = replace(columns, messages="messages")
    for warning in check_columns(first, columns, formatting, entry.where):
        logger.warning("%s", warning)
    if entry.tags is not None:
        tags = named_tags(entry.tags)
    elif formatting == "openai" and not objects:
        tags = ROLE_CONTENT
    else:
        tags = vocabulary(objects, columns.messages)
    return Form(formatting, columns, tags), why


def load_hub(entry: Entry, *, streaming: bool = False) -> Any:
    """The rows of a data set of the Hugging Face hub, with media not decoded; it is downloaded if needed.

    Args:
        entry: its entry.
        streaming: stream the rows instead of downloading the data set.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    assert entry.hub is not None
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    logger.info("data set %s: %s of the Hugging Face hub%s", entry.name, entry.hub, " (offline)" if offline else "")
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    try:
        rows = datasets.load_dataset(entry.hub, name=entry.subset, data_dir=entry.folder, split=entry.split, **options)
        return undecoded(rows)
    except (OSError, ValueError, DatasetsError) as error:
        state = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else str(error)
        raise DataError(
            f"{entry.where}: {entry.hub} of the Hugging Face hub cannot be loaded ({state}); go online once, or "
            "download it and give its file under 'file_name'"
        ) from error
