"""``SampleFile``: the records of one data file as samples; ``RecordReader``: one record to a sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

from finetune.data_files.json_values import json_type
from finetune.data_files.records import data_files, is_pattern
from finetune.readers import (
    alpaca,
    answer_pairs,
    duplex_record,
    foreign_placeholders,
    grounding,
    official,
    openai,
    record_keys,
    sdk_record,
    sharegpt,
)
from finetune.readers.conversation import TRAIN_ON, TrainOn
from finetune.readers.forms import Form
from finetune.readers.record_media import MediaFolders
from finetune.readers.unread_keys import misspelled, unread_notes
from finetune.sample import DataError, Sample, SampleSet, Source, Text
from finetune.timeline import SDK_VERSION
from finetune.utils.errors import located
from finetune.utils.quoting import shown

_READERS = {"sharegpt": sharegpt.conversation, "alpaca": alpaca.conversation, "openai": openai.conversation}
_TURNS = {"official": "'conversations'", "alpaca": "'instruction' and 'output'", "duplex": "'duplex'"}
_DUPLEX = Form("duplex")


@dataclass(frozen=True, slots=True)
class RecordReader:
    """Builds samples from records.

    Attributes:
        form: format of the records.
        where: base folders of media files.
        train_on: "all" to train every answer, "last" for the last one of a conversation.
        pairs: the keys of both answers of preference pairs; None for conversations.
    """

    form: Form
    where: MediaFolders
    train_on: TrainOn
    pairs: answer_pairs.Comparison | None = None

    def sample(self, record: Any, source: Source) -> Sample:
        """The sample of a record.

        Raises:
            DataError: the record does not match the format, or a media file does not exist.
        """
        with located(source):
            if not isinstance(record, dict):
                wanted = _TURNS.get(self.form.name, repr(self.form.columns.messages))
                raise DataError(f"is {json_type(record)}, not an object with {wanted}")
            if self.pairs is not None:
                chosen, rejected = (self._sample(each, source) for each in answer_pairs.split(record, self.pairs))
                return answer_pairs.pair_of(chosen, rejected)
            if record_keys.compared(record):
                raise DataError(f"has {record_keys.compared(record)}")
            return self._sample(record, source)

    def _sample(self, record: Mapping[str, Any], source: Source) -> Sample:
        name = self.form.name
        if record_keys.is_timeline(record):  # also in a file of conversations
            return self._timeline(record, source)
        if name == "duplex":
            raise DataError(
                f"has neither {record_keys.DUPLEX!r} nor 'tracks' and 'unit_policy', and the file is read in the "
                "duplex format"
            )
        try:
            if name == "official":
                messages, tools = official.conversation(record, self.where, self.train_on)
            else:
                messages, tools = _READERS[name](record, self.where, self.train_on, self.form)
            sample = Sample(source.id or str(source.index), source, messages, tools=tools)
        except DataError as error:
            if hint := misspelled(record, self.form):
                raise DataError(f"{error.args[0]}; {hint}") from error
            raise
        sample = grounding.ground(record, sample)
        check_texts(sample)
        notes = (*foreign_placeholders.notes(sample), *unread_notes(record, sample, self.form, self.where))
        return replace(sample, notes=(*sample.notes, *notes)) if notes else sample

    def _timeline(self, record: Mapping[str, Any], source: Source) -> Sample:
        of_sdk = record_keys.is_of_sdk(record)
        read = sdk_record.read_record if of_sdk else duplex_record.read_timeline
        messages, timeline, notes = read(record, self.where)
        sample = Sample(source.id or str(source.index), source, messages, notes, timeline=timeline)
        check_texts(sample)
        return sample if of_sdk else replace(sample, notes=(*notes, *unread_notes(record, sample, _DUPLEX, self.where)))

    @property
    def fingerprint(self) -> str:
        """Text that changes when the way records are read changes."""
        return json.dumps(
            [
                asdict(self.form),
                [str(folder) for folder in self.where.folders],
                self.where.allowed is not None,
                *filter(None, [self.pairs]),
                SDK_VERSION,
            ]
        )


class SampleFile(SampleSet):
    """The samples of a data file, built on access; images are not opened.

    Args:
        records: parsed records, in order.
        path: their file or folder, or the id of a hub data set; for errors.
        reading: the reader of their format.
        name: name of the data set, "" for a file without one.

    Raises:
        ValueError: invalid ``train_on``.
    """

    def __init__(self, records: Sequence[Any], path: str | Path, reading: RecordReader, name: str = "") -> None:
        if reading.train_on not in TRAIN_ON:
            raise ValueError(f"no train_on {reading.train_on!r}; there are {', '.join(TRAIN_ON)}")
        self.reading = reading
        self.name = name
        self.path = Path(path)
        self._file = str(path)
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """The sample at ``index``.

        Raises:
            DataError: the record does not match the format, or a media file does not exist.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        record = self._records[number]
        return self.reading.sample(record, self._source(record, number))

    def record(self, index: int) -> Any:
        """Record ``index`` as stored in the file."""
        return self._records[index]

    def source(self, index: int) -> Source:
        """File, position and id of record ``index``, also of a bad one."""
        number = range(len(self))[index]
        try:
            return self._source(self._records[number], number)
        except DataError:  # raised again when the sample is accessed
            return Source(self._file, number)

    @property
    def files(self) -> list[Path]:
        """The data files, on which cached results depend."""
        return data_files(self.path) if self.path.exists() or is_pattern(self.path) else []

    @property
    def train_on(self) -> TrainOn:
        """Which answers are trained."""
        return self.reading.train_on

    @property
    def fingerprint(self) -> str:
        """Text that changes when the way records are read changes."""
        return self.reading.fingerprint

    def _source(self, record: Any, number: int) -> Source:
        return Source(self._file, number, identity(record))


def identity(record: Any) -> str:
    """The id of a record as text, empty if it has none; it may have any type."""
    given = record.get("id") if isinstance(record, dict) else None
    if given is None and isinstance(record, dict) and record_keys.is_of_sdk(record):
        given = record.get("data_id")
    if given is None:
        return ""
    return given if isinstance(given, str) else shown(given) if isinstance(given, (dict, list)) else str(given)


def check_texts(sample: Sample) -> None:
    """Checks that all text of a sample can be encoded: it must not contain lone surrogates.

    Raises:
        DataError: with the turn of the lone surrogate.
    """
    check_text(sample.source.id, "'id'")
    for turn, message in enumerate(sample.messages):
        for part in message.parts:
            if isinstance(part, Text):
                check_text(part.text, f"turn {turn} ({message.role})")
        check_text(message.thought, f"the thinking of turn {turn}")


def check_text(text: str, where: str) -> None:
    """Checks a text for lone surrogates; ``where`` is its position in the record, for the error."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 20, 0) : error.start + 20]
        raise DataError(
            f"{where}: character {error.start} is half of a surrogate pair ({text[error.start]!a}, in "
            f"{around!r}), as text cut between two halves has it; write the whole character or remove it"
        ) from error
