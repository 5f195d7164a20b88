"""``SamplePolicy``: encodes the samples of a data set and applies ``--on_bad_sample`` and ``--overlong``."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.length_policy import OUTCOMES, LengthPolicy, OverlongError
from finetune.media import worker_process
from finetune.sample import DataError, Sample, Source, as_sample_set

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"
"""File in OUTPUT_DIR that lists the skipped records, one JSON object per line."""

# If the first this many records of a data set all fail, all are assumed to fail.
_PROBED = 50
_COUNTED = (*OUTCOMES, "skipped")
# The share of bad samples is not judged during training before this many samples.
_ENOUGH = 50


class SamplePolicy:
    """Encodes samples of one data set, with the policies for bad and overlong samples.

    A skipped sample is replaced in its batch by an empty example (one padding token without label or image), so that
    batch sizes stay equal on all ranks. Skipped are samples that ``LengthPolicy`` cannot make fit and, with
    ``on_bad_sample`` "skip", samples that raise DataError. All other exceptions propagate.

    Args:
        samples: the data set.
        encoder: the encoder of the run.
        overlong: policy for samples above max_length; see ``LengthPolicy``.
        on_bad_sample: "error" or "skip".
        report: file that gets one line per skipped record and process; None for no file.
        remeasure: ignore cached checks and lengths.
        max_bad_share: with "skip", the largest allowed share of bad samples. Samples that are skipped only because they
            are too long do not count.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        *,
        overlong: str = "error",
        on_bad_sample: str = "error",
        report: Path | None = None,
        remeasure: bool = False,
        max_bad_share: float = 1.0,
    ) -> None:
        self.samples = as_sample_set(samples)
        self.remeasure = remeasure
        self.length_policy = LengthPolicy(encoder, overlong)
        self.on_bad_sample = on_bad_sample
        self.max_bad_share = max_bad_share
        self._report = report
        self._reported: set[tuple[str, int]] = set()
        # In shared memory: dataloader workers count too.
        self._counts = multiprocessing.Array("q", len(_COUNTED) + 1)

    def example(self, index: int) -> Example:
        """The example of sample ``index``, or an empty one if it is skipped.

        Raises:
            DataError: the sample cannot be used and is not skipped.
        """
        return self.encode(lambda: self.samples[index], lambda: self.samples.source(index))

    def encode(self, build: Callable[[], Sample], source: Callable[[], Source]) -> Example:
        """The example of a sample, or an empty one if it is skipped.

        Args:
            build: builds the sample from its record.
            source: gives the file and position of the record, also of a bad one.

        Raises:
            DataError: the sample cannot be used and is not skipped.
        """
        worker_process.configure_worker(str(source()))
        try:
            example, outcome = self.length_policy.encode(build())
        except DataError as error:
            if not self.skips(error):
                raise
            self._note(source(), error)
            self._count("skipped", bad=not isinstance(error, OverlongError))
            return self.length_policy.encoder.empty(str(source()))
        self._count(outcome)
        return example

    def skips(self, error: DataError) -> bool:
        """Whether a sample with this error is skipped rather than ending the run."""
        return self.on_bad_sample == "skip" or isinstance(error, OverlongError)

    def counts(self) -> list[int]:
        """Number of samples per outcome, in this process and its dataloader workers; see ``describe_counts``."""
        return self._counts[: len(_COUNTED)]

    def totals(self) -> tuple[int, int]:
        """Number of samples encoded in this process and its dataloader workers, and how many of them were bad."""
        *counts, bad = self._counts[:]
        return sum(counts), bad

    def probe(self) -> None:
        """Checks that at least one of the first samples can be encoded.

        Raises:
            DataError: none can, and all of them would be skipped.
        """
        first = None
        tried = min(_PROBED, len(self.samples))
        for index in range(tried):
            try:
                self.length_policy.check(self.samples[index])
            except DataError as error:
                if not self.skips(error):
                    return  # encoding this sample ends the run
                first = first or error
            else:
                return
        raise DataError(f"none of the first {tried} records can be used; the first of them: {first}")

    def _count(self, outcome: str, *, bad: bool = False) -> None:
        with self._counts.get_lock():
            self._counts[_COUNTED.index(outcome)] += 1
            self._counts[-1] += bad

    def _note(self, source: Source, error: DataError) -> None:
        if (source.file, source.index) in self._reported:
            return
        self._reported.add((source.file, source.index))
        logger.warning("skipped, an empty row takes its place: %s", error)
        if self._report is None:
            return
        line = {"file": source.file, "record": source.index, "id": source.id}
        line |= {"exception": type(error).__name__, "message": str(error)}
        # One write per line in append mode: lines of several processes do not interleave.
        # A lone surrogate in an id is escaped as in JSON.
        with self._report.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def share_is_bad(bad: int, total: int, max_share: float, *, few: bool = True) -> bool:
    """Whether the share of bad samples is above ``max_share``; fewer than 50 samples are judged only with ``few``."""
    return (few or total >= _ENOUGH) and bad > max_share * total


def describe_counts(counts: Sequence[int]) -> str | None:
    """The counts of ``SamplePolicy.counts``, summed over ranks, as one line; None if a run had no step left to make."""
    if not any(counts):
        return None
    named = dict(zip(_COUNTED, map(int, counts), strict=True))
    return f"{sum(named.values())} samples encoded: " + ", ".join(f"{count} {name}" for name, count in named.items())


def describe_bad_samples(report: Path) -> str | None:
    """Number of distinct records that a run skipped, as one line; None when there are none."""
    if not report.is_file():
        return None
    kinds: dict[tuple[str, int], str] = {}
    with report.open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            kinds[line["file"], line["record"]] = line["exception"]
    counts = ", ".join(f"{count} {name}" for name, count in Counter(kinds.values()).most_common())
    return f"{len(kinds)} records were skipped ({counts}); {report} lists them"


def count_bad_samples(report: Path) -> int:
    """Number of distinct lines of the report, to which several processes may write the same record; 0 without one."""
    return len(set(report.read_text(encoding="utf-8").splitlines())) if report.is_file() else 0
