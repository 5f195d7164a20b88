"""PyTorch datasets and collators: ``SupervisedDataset``, ``StreamedDataset``, ``DataCollator``, ``PackingCollator``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from finetune.arguments.data import DataArguments
from finetune.data_files import records
from finetune.encoding.collate import Batch, pack, pad, pairs_of
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.sample_policy import BAD_SAMPLES, SamplePolicy
from finetune.readers.dataset_info import find_entry
from finetune.readers.mixture import Mixture, open_data, parse_names
from finetune.readers.streamed_samples import StreamedSamples, open_stream
from finetune.sample import DataError, Sample

logger = logging.getLogger(__name__)


class SupervisedDataset(Dataset[Example]):
    """A map-style data set that encodes samples on access.

    Route of a record: data file -> ``readers`` (``Sample``) -> ``Encoder`` (``Example``) -> ``DataCollator`` (batch).
    A bad or overlong sample raises DataError with its file and record, or is skipped by ``SamplePolicy``: an empty
    example takes its place in the batch.

    >>> import json
    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> from finetune.checkpoints.base_checkpoint import resolve_base
    >>> from finetune.tokenizers.tokenization import load_tokenizer
    >>> from finetune.readers.mixture import open_data
    >>> from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
    >>> folder = Path(mkdtemp())
    >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    >>> _ = (folder / "data.json").write_text(json.dumps([{"id": "0", "conversations": turns}]))
    >>> base = resolve_base(write_tiny_checkpoint("v2_6", folder / "model"))
    >>> encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings, max_length=2048)
    >>> dataset = SupervisedDataset(open_data(folder / "data.json", None), encoder)
    >>> example = dataset[0]
    >>> encoder.tokenizer.decode(example.labels[example.labels >= 0])
    'Hello.<|im_end|>'
    >>> batch = DataCollator(encoder.pad_id)([example, encoder.empty("a skipped record")])
    >>> batch["input_ids"].shape == batch["labels"].shape, batch["attention_mask"].sum(1).tolist()[1]
    (True, 1)
    >>> row = PackingCollator(encoder.empty("no example"))([example, example])
    >>> row["input_ids"].shape[0], row["cu_seq_lens_q"].tolist() == [0, len(example.labels), 2 * len(example.labels)]
    (1, True)

    Args:
        samples: the data set.
        encoder: the encoder of the run.
        sample_policy: policies for bad and overlong samples; None to raise.

    Attributes:
        references: (n, 2) log-probabilities of both answers of every pair by the reference model, once known.
    """

    def __init__(self, samples: Sequence[Sample], encoder: Encoder, sample_policy: SamplePolicy | None = None) -> None:
        super().__init__()
        self.samples = samples
        self.sample_policy = sample_policy or SamplePolicy(samples, encoder)
        self.references: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        example = self.sample_policy.example(index)
        if self.references is None:
            return example
        chosen, rejected = self.references[index].tolist()
        return replace(example, reference=(chosen, rejected))

    def first_usable(self) -> Example:
        """The first example that is not skipped."""
        return _first_usable(self.sample_policy)


class StreamedDataset(IterableDataset[Example]):
    """An endless iterable data set over files that are read sequentially (``--streaming``).

    All dataloader workers of all ranks together see every record once per pass. ``samples`` are the first records of
    the data, for checks that need samples by index.

    Args:
        streamed: the records.
        sample_policy: policies for bad and overlong samples.
    """

    def __init__(self, streamed: StreamedSamples, sample_policy: SamplePolicy) -> None:
        super().__init__()
        self.streamed = streamed
        self.samples: Sequence[Sample] = streamed.head
        self.sample_policy = sample_policy
        self._rank, self._world, self._batch_size, self._passed = 0, 1, 1, 0

    def set_shard(self, rank: int, world: int, batch_size: int, passed: int = 0) -> None:
        """Sets the part of the stream that this rank reads.

        Args:
            rank: rank of this process.
            world: number of processes.
            batch_size: examples per batch.
            passed: batches of this rank that were trained before the run was resumed; their examples are empty, and the
                Trainer skips them.
        """
        self._rank, self._world, self._batch_size, self._passed = rank, world, batch_size, passed

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # The dataloader takes batches from its workers round-robin.
        passed = len(range(number, self._passed, workers)) * self._batch_size
        records = self.streamed.stream.endless(self._rank * workers + number, self._world * workers)
        for place, record in enumerate(records):
            if place < passed:
                yield self.sample_policy.length_policy.encoder.empty(str(record.source()))
            else:
                yield self.sample_policy.encode(partial(self.streamed.sample, record), record.source)

    def first_usable(self) -> Example:
        """The first example that is not skipped."""
        return _first_usable(self.sample_policy)


def _first_usable(sample_policy: SamplePolicy) -> Example:
    examples = map(sample_policy.example, range(len(sample_policy.samples)))
    return next(example for example in examples if (example.labels >= 0).any())


class DataCollator:
    """Collates examples into a batch padded on the right; ``finetune.encoding.collate.pad`` describes its tensors.

    The batch also has "sources", file and record of each row. The trainer removes it and logs it when a loss is not
    finite. ``SupervisedDataset`` has an example.

    Args:
        pad_id: padding token id.
        pairs: whether the examples are preference pairs, each with two rows; see ``pairs_of``.
    """

    def __init__(self, pad_id: int, *, pairs: bool = False) -> None:
        self.pad_id, self.pairs = pad_id, pairs

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """The padded batch of some examples."""
        rows, more = pairs_of(examples) if self.pairs else (examples, {})
        return Batch(pad(rows, self.pad_id), **more, sources=[example.source for example in examples])


class PackingCollator:
    """Packs examples into one row; ``finetune.encoding.collate.pack`` describes its tensors.

    ``SupervisedDataset`` has an example.

    Args:
        filler: example for a rank without examples in a micro-batch.
        pairs: as in ``DataCollator``.
    """

    def __init__(self, filler: Example, *, pairs: bool = False) -> None:
        self.filler, self.pairs = filler, pairs

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """The packed row of some examples, with "sources" as in ``DataCollator``."""
        examples = examples or [self.filler]
        rows, more = pairs_of(examples) if self.pairs else (examples, {})
        return Batch(pack(rows), **more, sources=[example.source for example in examples])


class DataModule(TypedDict):
    """The data arguments of the trainer."""

    train_dataset: SupervisedDataset | StreamedDataset
    eval_dataset: SupervisedDataset | None
    data_collator: DataCollator


def make_supervised_data_module(
    data: DataArguments, encoder: Encoder, output: Path | None = None, seed: int = 42
) -> DataModule:
    """Builds the training set, evaluation set and collator from the flags.

    Args:
        data: the flags.
        encoder: the encoder of the run.
        output: folder of the file that lists skipped records; None for no file.
        seed: random seed of data set shares and of the ``--val_size`` split.

    Raises:
        DataError: a file that is missing, malformed or empty; a data set that dataset_info.json does not describe.
    """

    def policy_of(samples: Sequence[Sample]) -> SamplePolicy:
        report = None if output is None else output / BAD_SAMPLES
        return SamplePolicy(samples, encoder, report=report, **data.policies)

    def dataset(samples: Sequence[Sample]) -> SupervisedDataset:
        return SupervisedDataset(samples, encoder, policy_of(samples))

    def opened(path: str | None, names: str | None) -> Mixture:
        return open_data(path, names, seed=seed, **data.reading)

    evaluation = None
    if data.eval_data_path or data.eval_dataset:
        evaluation = dataset(opened(data.eval_data_path, data.eval_dataset))
    if data.streaming:
        streamed = _stream(data, seed)
        train = StreamedDataset(streamed, policy_of(streamed.head))
    else:
        samples = opened(data.data_path, data.dataset)
        if data.val_size:
            samples, kept = samples.split(data.val_size, seed)
            evaluation = dataset(kept)
        train = dataset(samples)
    collator = DataCollator(encoder.pad_id, pairs=data.stage == "dpo")
    count = "streamed" if isinstance(train, StreamedDataset) else len(train)
    logger.info("%s training samples, %d evaluation samples", count, len(evaluation or ()))
    return DataModule(train_dataset=train, eval_dataset=evaluation, data_collator=collator)


def data_files(data: DataArguments) -> list[Path]:
    """The training data files named by the flags, without opening them; data sets of the hub have none.

    Raises:
        DataError: a folder without data files, or a data set that is not described.
    """
    if data.data_path is not None:
        return records.data_files(Path(data.data_path).expanduser())
    entries = [find_entry(named.name, data.dataset_dir) for named in parse_names(data.dataset or "")]
    return [file for entry in entries if entry.file is not None for file in records.data_files(entry.file)]


def _stream(data: DataArguments, seed: int) -> StreamedSamples:
    for flag, why in (
        ("val_size", "a stream cannot be split: give evaluation data (--eval_data_path or --eval_dataset)"),
        ("max_samples", "the number of records of a stream is unknown: limit training with --max_steps"),
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
