"""The training data: records become samples, samples become examples, examples become padded batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from finetune.arguments.data import DataArguments
from finetune.data_files import records
from finetune.encoding.collate import Batch, pack, pad
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.sample_policy import BAD_SAMPLES, SamplePolicy
from finetune.readers.dataset_info import find_entry
from finetune.readers.mixture import Mixture, open_data, parse_names
from finetune.readers.streamed_samples import StreamedSamples, open_stream
from finetune.sample import DataError, Sample

logger = logging.getLogger(__name__)


class SupervisedDataset(Dataset[Example]):
    """Samples encoded on access.

    A sample that cannot be used, or is too long, meets the policies of its intake. By default it raises DataError
    naming file and record; what a policy leaves out leaves an empty row in its batch, and no other sample in its place.
    """

    def __init__(self, samples: Sequence[Sample], encoder: Encoder, intake: SamplePolicy | None = None) -> None:
        super().__init__()
        self.samples = samples
        self.intake = intake or SamplePolicy(samples, encoder)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        return self.intake.take(index)

    def first_usable(self) -> Example:
        """The first example that is not left out."""
        return _first_usable(self.intake)


class StreamedDataset(IterableDataset[Example]):
    """Records read from front to back, for data that is too large for anything else; it never ends.

    All loader processes of all ranks together see every record once per pass. ``samples`` are the first records of the
    data, for what wants samples by number.

    Args:
        streamed: the records.
        intake: of its head; streamed records meet the same policies.
    """

    def __init__(self, streamed: StreamedSamples, intake: SamplePolicy) -> None:
        super().__init__()
        self.streamed = streamed
        self.samples: Sequence[Sample] = streamed.head
        self.intake = intake
        self._rank, self._world, self._batch_size, self._passed = 0, 1, 1, 0

    def deal(self, rank: int, world: int, batch_size: int, passed: int = 0) -> None:
        """Says which records are read here.

        Args:
            rank: number of this process.
            world: processes.
            batch_size: examples per batch.
            passed: batches of this rank that were trained before; an empty row stands for each of their examples, for
                a loader that skips them.
        """
        self._rank, self._world, self._batch_size, self._passed = rank, world, batch_size, passed

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The loader takes a batch from each of its processes in turn.
        passed = len(range(number, self._passed, workers)) * self._batch_size
        records = self.streamed.stream.endless(self._rank * workers + number, self._world * workers)
        for place, record in enumerate(records):
            if place < passed:
                yield self.intake.fitter.encoder.empty(str(record.source()))
            else:
                yield self.intake.encode(partial(self.streamed.sample, record), record.source)

    def first_usable(self) -> Example:
        """The first example that is not left out."""
        return _first_usable(self.intake)


def _first_usable(intake: SamplePolicy) -> Example:
    examples = map(intake.take, range(len(intake.samples)))
    return next(example for example in examples if (example.labels >= 0).any())


class DataCollator:
    """Pads examples to the right; see ``finetune.encoding.collate.pad`` for the batch.

    One entry is not for the network: "sources", where each row came from, which the trainer takes out and names when a
    loss is not finite.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """The padded batch of some examples."""
        return Batch(pad(examples, self.pad_id), sources=[example.source for example in examples])


class PackingCollator:
    """Lays examples into one row; see ``finetune.encoding.collate.pack`` for the batch.

    Args:
        filler: the row of a rank that has no example.
    """

    def __init__(self, filler: Example) -> None:
        self.filler = filler

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """The row of some examples, and where each came from, as DataCollator has it."""
        examples = examples or [self.filler]
        return Batch(pack(examples), sources=[example.source for example in examples])


class DataModule(TypedDict):
    """What the trainer takes about data."""

    train_dataset: SupervisedDataset | StreamedDataset
    eval_dataset: SupervisedDataset | None
    data_collator: DataCollator


def make_supervised_data_module(
    data: DataArguments, encoder: Encoder, output: Path | None = None, seed: int = 42
) -> DataModule:
    """Training and evaluation set of the flags.

    Args:
        data: the flags.
        encoder: the encoder of the run.
        output: folder of the file that lists records left out; None for no file.
        seed: of what is drawn at random: shares of data sets, the evaluation part of the training data.

    Raises:
        DataError: a file that is missing or malformed, or without records; a data set that is not described.
    """

    def intake(samples: Sequence[Sample]) -> SamplePolicy:
        report = None if output is None else output / BAD_SAMPLES
        return SamplePolicy(samples, encoder, report=report, **data.policies)

    def dataset(samples: Sequence[Sample]) -> SupervisedDataset:
        return SupervisedDataset(samples, encoder, intake(samples))

    def opened(path: str | None, names: str | None) -> Mixture:
        return open_data(path, names, seed=seed, **data.reading)

    evaluation = None
    if data.eval_data_path or data.eval_dataset:
        evaluation = dataset(opened(data.eval_data_path, data.eval_dataset))
    if data.streaming:
        streamed = _stream(data, seed)
        train = StreamedDataset(streamed, intake(streamed.head))
    else:
        samples = opened(data.data_path, data.dataset)
        if data.val_size:
            samples, kept = samples.split(data.val_size, seed)
            evaluation = dataset(kept)
        train = dataset(samples)
    count = "streamed" if isinstance(train, StreamedDataset) else len(train)
    logger.info("%s training samples, %d evaluation samples", count, len(evaluation or ()))
    return DataModule(train_dataset=train, eval_dataset=evaluation, data_collator=DataCollator(encoder.pad_id))


def data_files(data: DataArguments) -> list[Path]:
    """The files that the flags about training data name, none of them opened; data sets of the hub have none.

    Raises:
        DataError: a folder without data files, or a data set that is not described.
    """
    if data.data_path is not None:
        return records.data_files(Path(data.data_path).expanduser())
    entries = [find_entry(named.name, data.dataset_dir) for named in parse_names(data.dataset or "")]
    return [file for entry in entries if entry.file is not None for file in records.data_files(entry.file)]


def _stream(data: DataArguments, seed: int) -> StreamedSamples:
    for flag, why in (
        ("val_size", "nothing can be kept out of a stream: give evaluation data of their own"),
        ("max_samples", "a stream has no number of records: --max_steps says when training ends"),
    ):
        if getattr(data, flag):
            raise DataError(f"--streaming true with --{flag}: {why}")
    if data.buffer_size < 1:
        raise DataError(f"--buffer_size {data.buffer_size}: at least 1 record is needed")
    return open_stream(
        data.data_path,
        data.dataset,
        dataset_dir=data.dataset_dir,
        media_dir=data.media_dir,
        image_root=data.image_root,
        train_on=data.train_on,
        data_format=data.data_format,
        seed=seed,
        buffer_size=data.buffer_size,
        strict_paths=data.strict_paths,
    )
