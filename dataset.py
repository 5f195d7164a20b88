"""The training data: records become samples, samples become examples, examples become padded batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch.utils.data import Dataset

from finetune.arguments import DataArguments
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.intake import BAD_SAMPLES, Intake
from finetune.readers.mixture import Mixture, open_data
from finetune.sample import Sample

logger = logging.getLogger(__name__)


class SupervisedDataset(Dataset[Example]):
    """Samples encoded on access.

    A sample that cannot be used, or is too long, meets the policies of its intake. By default it raises DataError
    naming file and record; what a policy leaves out leaves an empty row in its batch, and no other sample in its place.
    """

    def __init__(self, samples: Sequence[Sample], encoder: Encoder, intake: Intake | None = None) -> None:
        super().__init__()
        self.samples = samples
        self.intake = intake or Intake(samples, encoder)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        return self.intake.take(index)

    def first_usable(self) -> Example:
        """The first example that is not left out."""
        return next(example for example in (self[index] for index in range(len(self))) if (example.labels >= 0).any())


class DataCollator:
    """Pads examples to the right; see ``finetune.encoding.collate.pad`` for the batch.

    One entry is not for the network: "sources", where each row came from, which the trainer takes out and names when a
    loss is not finite.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The padded batch of some examples."""
        return {**pad(examples, self.pad_id), "sources": [example.source for example in examples]}


class DataModule(TypedDict):
    """What the trainer takes about data."""

    train_dataset: SupervisedDataset
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

    def dataset(samples: Sequence[Sample]) -> SupervisedDataset:
        report = None if output is None else output / BAD_SAMPLES
        intake = Intake(samples, encoder, overlong=data.overlong, on_bad_sample=data.on_bad_sample, report=report)
        return SupervisedDataset(samples, encoder, intake)

    def opened(path: str | None, names: str | None) -> Mixture:
        return open_data(
            path,
            names,
            dataset_dir=data.dataset_dir,
            media_dir=data.media_dir,
            image_root=data.image_root,
            train_on=data.train_on,
            data_format=data.data_format,
            max_samples=data.max_samples,
            seed=seed,
            rebuild=data.overwrite_cache,
        )

    samples, kept = opened(data.data_path, data.dataset), None
    if data.val_size:
        samples, kept = samples.split(data.val_size, seed)
    elif data.eval_data_path or data.eval_dataset:
        kept = opened(data.eval_data_path, data.eval_dataset)
    train = dataset(samples)
    evaluation = None if kept is None else dataset(kept)
    logger.info("%d training samples, %d evaluation samples", len(train), len(evaluation or ()))
    return DataModule(train_dataset=train, eval_dataset=evaluation, data_collator=DataCollator(encoder.pad_id))
