"""A look at the records before step 1: structure, image headers and lengths, all problems in one report."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from finetune.data_check.check_cache import CachedCheck, CheckCache, fingerprint
from finetune.data_check.check_report import CheckReport
from finetune.data_check.sample_hash import likeness, repeated
from finetune.data_check.suspicious import last_answer, suspicions
from finetune.encoding.length_policy import LengthPolicy, OverlongError
from finetune.encoding.sample_policy import SamplePolicy, share_is_bad, source_of
from finetune.sample import MEDIA_KINDS, DataError, Sample
from finetune.templates.rendering import IGNORE
from finetune.utils.errors import UnusableResultError

logger = logging.getLogger(__name__)

LEVELS = ("full", "sample", "off")
FULL_UP_TO = 20_000
"""Records of the largest data set that is checked in full by default."""
SAMPLED = 1_000
"""Records that a sampled check looks at."""

_CHUNK = 32


class CheckError(DataError):
    """Records that cannot be used, found before the first step."""


def check_before_training(intakes: Sequence[SamplePolicy], level: str | None) -> None:
    """Checks data sets, reports everything at once, and makes sure that each has a sample to use.

    Args:
        intakes: training and, where there is any, evaluation data.
        level: one of LEVELS, None for "full" up to FULL_UP_TO records and "sample" above.

    Raises:
        DataError, UnusableResultError: as ``judge``; the reports are logged before.
    """
    reports: list[CheckReport | None] = []
    for intake in intakes:
        report = None if level == "off" else check(intake.samples, intake.fitter, level, rebuild=intake.remeasure)
        reports.append(report)
        if report is not None:
            logger.info("%s", report)
    for line in overlap(intakes, reports):
        logger.warning("%s", line)
    judge(intakes, reports)


def judge(intakes: Sequence[SamplePolicy], reports: Sequence[CheckReport | None]) -> None:
    """Whether training would begin with these data sets.

    Args:
        intakes: the data sets and their policies.
        reports: what was found in each; None where nobody has looked.

    Raises:
        CheckError: records cannot be used and are not to be skipped.
        UnusableResultError: more of them cannot be used than the intake's share allows.
        DataError: a data set without any sample to use.
    """
    looked = [(intake, report) for intake, report in zip(intakes, reports, strict=True) if report is not None]
    fatal = [report for intake, report in looked if report.problems and intake.on_bad_sample == "error"]
    if fatal:
        count = sum(len(report.problems) for report in fatal)
        raise CheckError(
            f"{count} records cannot be used, the first: {fatal[0].problems[0]} (all kinds above; "
            "--on_bad_sample skip leaves such records out, --check off starts without looking)"
        )
    for intake, report in looked:
        if report.problems:
            logger.warning("%s: %d records will be left out", report.file, len(report.problems))
        if not report.usable:
            first = (report.problems + report.left_out)[0]
            raise CheckError(f"{report.file}: none of {report.looked_at} records can be used; the first: {first}")
        if share_is_bad(len(report.problems), report.looked_at, intake.max_bad_share):
            raise UnusableResultError(
                f"{report.file}: {len(report.problems)} of {report.looked_at} records cannot be used, more than "
                f"--max_bad_share {intake.max_bad_share:g} allows; the first: {report.problems[0]}. Mend the data, or "
                "raise --max_bad_share if so many are expected to be unusable"
            )
    for intake in intakes:
        intake.probe()


def overlap(intakes: Sequence[SamplePolicy], reports: Sequence[CheckReport | None]) -> Iterator[str]:
    """A line for every two data sets that share records: what a model has been trained on measures nothing."""
    pairs = zip(intakes, reports, strict=True)
    looked = [(_once(intake.samples), report) for intake, report in pairs if report is not None]
    groups = repeated([(samples, report.alike) for samples, report in looked]) if len(looked) > 1 else []
    shared = Counter(pair for group in groups for pair in combinations(sorted({part for part, _ in group}), 2))
    for (one, other), count in sorted(shared.items()):
        names = f"{looked[one][1].file} and in {looked[other][1].file}"
        yield f"{count} records have the same text and media in {names}"


def _once(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The records of a data set, each once."""
    return getattr(samples, "once", samples)


def check(
    samples: Sequence[Sample],
    fitter: LengthPolicy,
    level: str | None = None,
    *,
    rebuild: bool = False,
    seen: Callable[[int, CachedCheck | DataError], object] | None = None,
) -> CheckReport:
    """Looks at the records of a data set without decoding an image; good ones are remembered.

    Args:
        samples: the data set.
        fitter: the encoder of the run and its policy for long samples.
        level: "full", "sample", or None for the default.
        rebuild: look again at good records that are remembered by the state of their files.
        seen: is told what becomes of each record, in order.
    """
    started = time.perf_counter()
    samples = _once(samples)
    chosen = _chosen(len(samples), level)
    report = CheckReport(_title(samples), len(samples), len(chosen))
    report.duplicates = _duplicates(samples, chosen)
    files = getattr(samples, "files", [Path(report.file)])
    cache = CheckCache(files, fingerprint(fitter, samples), rebuild=rebuild)
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    with (
        _threads() as pool,
        tqdm(
            total=len(chosen),
            desc=f"checking {Path(report.file).name}",
            unit="record",
            delay=1,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.2 if sys.stderr.isatty() else 10,
        ) as bar,
    ):
        looks = pool.map(lambda chunk: [_look(samples, index, fitter, cache) for index in chunk], chunks)
        for chunk, results in zip(chunks, looks, strict=True):
            bar.update(len(results))
            for index, result in zip(chunk, results, strict=True):
                _enter(report, index, result)
                if seen is not None:
                    seen(index, result)
    report.reused = cache.reused
    cache.write()
    report.repeated = sum(len(group) - 1 for group in repeated([(samples, report.alike)]))
    report.seconds = time.perf_counter() - started
    return report


def _chosen(records: int, level: str | None) -> Sequence[int]:
    """The records to look at: all, or evenly spaced ones."""
    if level is None:
        level = "full" if records <= FULL_UP_TO else "sample"
    if level not in LEVELS:
        raise ValueError(f"no level {level!r}; there are {', '.join(LEVELS)}")
    if level == "off":
        return []
    if level == "full" or records <= SAMPLED:
        return range(records)
    return [number * records // SAMPLED for number in range(SAMPLED)]


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads, not processes: reading files and tokenizing both run outside of Python's lock."""
    pool = ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 2))
    try:
        yield pool
    finally:
        # After an interrupt nothing that still waits is worth doing.
        pool.shutdown(cancel_futures=True)


def _look(samples: Sequence[Sample], index: int, fitter: LengthPolicy, cache: CheckCache) -> CachedCheck | DataError:
    """What becomes of one record; of good ones from the cache, when none of their files has changed."""
    if (known := cache.get(index)) is not None:
        return known
    try:
        sample = samples[index]
        fitted = fitter.fit(sample)
        sample = fitter.encoder.tools.written(sample)  # calls are looked at as the text that is trained
    except DataError as error:
        return error
    size = fitter.encoder.measured(fitted.sample, fitted.plans, fitted.rendered)
    images, videos, sounds = (sum(1 for _ in sample.media(kind)) for kind in MEDIA_KINDS)
    looked = CachedCheck(
        fitted.outcome,
        size.tokens,
        fitted.lost_images,
        trained=sum(label != IGNORE for label in fitted.rendered.labels),
        items=size.items,
        media=(images, videos, sounds),
        notes=(*sample.notes, *suspicions(sample, fitter.encoder.vocabulary)),
        alike=likeness(sample),
        answer=last_answer(sample),
    )
    cache.put(index, looked, [path for media in sample.media() for path in media.files])
    return looked


def _enter(report: CheckReport, index: int, result: CachedCheck | DataError) -> None:
    if isinstance(result, OverlongError):
        report.left_out.append(str(result))
    elif isinstance(result, DataError):
        report.problems.append(str(result))
    else:
        report.enter(index, result)


def _title(samples: Sequence[Sample]) -> str:
    """The name of a data set, else its file."""
    return getattr(samples, "title", None) or source_of(samples, 0).file


def _duplicates(samples: Sequence[Sample], chosen: Sequence[int]) -> dict[str, int]:
    """Ids that different records of a file share, of those that are looked at: an id may need its record parsed."""
    if getattr(samples, "source", None) is None:
        return {}  # only readers know ids without building samples
    sources = {source_of(samples, index) for index in chosen}
    ids = Counter((source.file, source.id) for source in sources)
    return {identity: count for (_, identity), count in ids.items() if identity and count > 1}
