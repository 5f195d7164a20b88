"""Where samples of a data set become examples, and what happens to those that cannot be used."""

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
from finetune.sample import DataError, Sample, Source

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"
"""File in OUTPUT_DIR that lists the records left out, one JSON object per line."""

# So many records from the start of a data set that all fail are taken for all of them.
_PROBED = 50
_COUNTED = (*OUTCOMES, "left out")
# Of fewer samples no share is judged while a run goes on.
_ENOUGH = 50


class SamplePolicy:
    """Samples of one data set to examples under the policies of the run.

    A sample that is left out is replaced in its batch row by a filler, one padding token without label and image, so
    that batches keep their size and all ranks stay in step. It is left out when it is too long and its policy finds no
    way, or with ``on_bad_sample`` "skip" when it raises DataError. Every other exception passes.

    Args:
        samples: the data set.
        encoder: the encoder of the run.
        overlong: what happens to samples above the limit; see ``LengthPolicy``.
        on_bad_sample: "error" or "skip".
        report: file that gets a line for every record left out, once per process; None for no file.
        remeasure: look at the samples and measure them anew, though results are remembered.
        max_bad_share: with "skip", the largest share of samples taken that may be unusable. Samples that are left out
            only because they are too long are not counted as such: that is the policy asked for.
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
        self.samples = samples
        self.remeasure = remeasure
        self.fitter = LengthPolicy(encoder, overlong)
        self.on_bad_sample = on_bad_sample
        self.max_bad_share = max_bad_share
        self._report = report
        self._reported: set[tuple[str, int]] = set()
        # Shared with the loader processes, which do the counting.
        self._counts = multiprocessing.Array("q", len(_COUNTED) + 1)

    def take(self, index: int) -> Example:
        """The example of sample ``index``, or a filler.

        Raises:
            DataError: the sample cannot be used and is not left out.
        """
        return self.encode(lambda: self.samples[index], lambda: self.source(index))

    def encode(self, build: Callable[[], Sample], source: Callable[[], Source]) -> Example:
        """The example of a sample, or a filler.

        Args:
            build: makes the sample.
            source: tells where its record is, whether or not it makes a sample.

        Raises:
            DataError: the sample cannot be used and is not left out.
        """
        worker_process.settle(str(source()))
        try:
            example, outcome = self.fitter.encode(build())
        except DataError as error:
            if not self.leaves_out(error):
                raise
            self._note(source(), error)
            self._count("left out", bad=not isinstance(error, OverlongError))
            return self.fitter.encoder.empty(str(source()))
        self._count(outcome)
        return example

    def leaves_out(self, error: DataError) -> bool:
        """Whether a sample with this error is replaced rather than an end of the run."""
        return self.on_bad_sample == "skip" or isinstance(error, OverlongError)

    def source(self, index: int) -> Source:
        """Where record ``index`` is, whether or not it makes a sample."""
        return source_of(self.samples, index)

    def counts(self) -> list[int]:
        """How often samples were kept, shrunk, ..., in this process and its loaders; ``describe_counts`` names them."""
        return self._counts[: len(_COUNTED)]

    def taken(self) -> tuple[int, int]:
        """How many samples were taken in this process and its loaders, and how many of them could not be used."""
        *counts, bad = self._counts[:]
        return sum(counts), bad

    def probe(self) -> None:
        """Makes sure that a run has something to learn: one of the first samples becomes an example.

        Raises:
            DataError: none of them does, and the run would go on without them.
        """
        first = None
        tried = min(_PROBED, len(self.samples))
        for index in range(tried):
            try:
                self.fitter.encode(self.samples[index])
            except DataError as error:
                if not self.leaves_out(error):
                    return  # the run stops at it by itself, should it ever take it
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
        logger.warning("an empty row in place of %s", error)
        if self._report is None:
            return
        line = {"file": source.file, "record": source.index, "id": source.id}
        line |= {"exception": type(error).__name__, "message": str(error)}
        # One write of one line in append mode: the lines of several processes do not mix.
        # Half of a surrogate pair in an id is escaped as JSON escapes it.
        with self._report.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def share_is_bad(bad: int, taken: int, most: float, *, few: bool = True) -> bool:
    """Whether more than the share ``most`` of the samples taken is bad; less than 50 are judged only with ``few``."""
    return (few or taken >= _ENOUGH) and bad > most * taken


def source_of(samples: Sequence[Sample], index: int) -> Source:
    """Where record ``index`` is; readers know it without building the sample."""
    locate = getattr(samples, "source", None)
    if locate is not None:
        return locate(index)
    try:
        return samples[index].source
    except DataError:
        return Source("samples in memory", index)


def describe_counts(counts: Sequence[int]) -> str:
    """The counts of an intake, added up over ranks, as one line."""
    named = dict(zip(_COUNTED, map(int, counts), strict=True))
    return f"{sum(named.values())} samples encoded: " + ", ".join(f"{count} {name}" for name, count in named.items())


def describe_bad_samples(report: Path) -> str | None:
    """How many distinct records a run has left out, as one line; None when there are none."""
    if not report.is_file():
        return None
    kinds: dict[tuple[str, int], str] = {}
    with report.open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            kinds[line["file"], line["record"]] = line["exception"]
    counts = ", ".join(f"{count} {name}" for name, count in Counter(kinds.values()).most_common())
    return f"{len(kinds)} records were left out ({counts}); {report} lists them"
