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
from finetune.readers import read
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


def make_supervised_data_module(data: DataArguments, encoder: Encoder, output: Path | None = None) -> DataModule:
    """Training and evaluation set of the flags; records left out are listed in a file in ``output``.

    Raises:
        DataError: a file that is missing or malformed, or without records.
    """

    def dataset(path: str) -> SupervisedDataset:
        samples = read(path, image_root=data.image_root, train_on=data.train_on)
        report = None if output is None else output / BAD_SAMPLES
        intake = Intake(samples, encoder, overlong=data.overlong, on_bad_sample=data.on_bad_sample, report=report)
        return SupervisedDataset(samples, encoder, intake)

    assert data.data_path is not None  # parse_arguments sees to it
    train = dataset(data.data_path)
    evaluation = None if data.eval_data_path is None else dataset(data.eval_data_path)
    logger.info("%d training samples, %d evaluation samples", len(train), len(evaluation or ()))
    return DataModule(train_dataset=train, eval_dataset=evaluation, data_collator=DataCollator(encoder.pad_id))
