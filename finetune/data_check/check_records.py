"""The data check before training: structure, media headers and lengths of all records, in one report."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from finetune.data_check.check_cache import CachedCheck, CheckCache, fingerprint
from finetune.data_check.check_report import CheckReport, lines, lines_before_error
from finetune.data_check.decision_counts import counted, rendered_units, too_many_tokens
from finetune.data_check.sample_hash import content_key, duplicate_groups
from finetune.data_check.suspicious import last_answer, suspicions
from finetune.encoding.length_policy import LengthPolicy, OverlongError
from finetune.encoding.sample_policy import SamplePolicy, share_is_bad
from finetune.sample import MEDIA_KINDS, DataError, Sample, SampleSet, as_sample_set
from finetune.utils.errors import UnusableResultError

logger = logging.getLogger(__name__)

LEVELS = ("full", "sample", "off")
FULL_UP_TO = 20_000
"""Largest number of records that is checked in full by default."""
SAMPLED = 1_000
"""Number of records that ``--check sample`` checks."""

_CHUNK = 32


class CheckError(DataError):
    """Records that cannot be used, found before the first training step.

    Attributes:
        record: what is wrong with the first of them; the message says it too.
    """

    def __init__(self, message: str, record: str) -> None:
        super().__init__(message)
        self.record = record


def check_before_training(sample_policies: Sequence[SamplePolicy], level: str | None) -> None:
    """Checks data sets, logs a report of each, and raises if training cannot start with them.

    Args:
        sample_policies: training data and, if there is any, evaluation data.
        level: one of LEVELS, None for "full" up to FULL_UP_TO records and "sample" above.

    Raises:
        DataError, UnusableResultError: as ``require_usable``; the reports are logged first.
    """
    reports: list[CheckReport | None] = []
    for sample_policy in sample_policies:
        report = (
            None
            if level == "off"
            else check(sample_policy.samples, sample_policy.length_policy, level, rebuild=sample_policy.remeasure)
        )
        reports.append(report)
    try:
        require_usable(sample_policies, reports)
    except CheckError as error:
        _log(reports, partial(lines_before_error, said=error.record))
        raise
    except (DataError, UnusableResultError):
        _log(reports, lines)
        raise
    _log(reports, lines)
    for line in overlap(sample_policies, reports):
        logger.warning("%s", line)


def _log(reports: Sequence[CheckReport | None], form: Callable[[CheckReport], Iterable[str]]) -> None:
    for report in filter(None, reports):
        logger.info("%s", "\n".join(form(report)))


def require_usable(sample_policies: Sequence[SamplePolicy], reports: Sequence[CheckReport | None]) -> None:
    """Raises if training cannot start with these data sets.

    Args:
        sample_policies: the data sets and their policies.
        reports: the check report of each; None for a data set that was not checked.

    Raises:
        CheckError: bad records, and ``--on_bad_sample`` is "error".
        UnusableResultError: the share of bad records is above ``--max_bad_share``.
        DataError: a data set without any usable sample.
    """
    checked = [
        (sample_policy, report)
        for sample_policy, report in zip(sample_policies, reports, strict=True)
        if report is not None
    ]
    fatal = [report for sample_policy, report in checked if report.problems and sample_policy.on_bad_sample == "error"]
    if fatal:
        count = sum(len(report.problems) for report in fatal)
        told = "1 record cannot be used:" if count == 1 else f"{count} records cannot be used, the first:"
        raise CheckError(
            f"{told} {fatal[0].problems[0]} (--on_bad_sample skip skips such records, "
            "--check off starts without this check)",
            fatal[0].problems[0],
        )
    for sample_policy, report in checked:
        if report.problems:
            logger.warning("%s: %d records will be skipped", report.file, len(report.problems))
        if not report.usable:
            first = (report.problems + report.overlong)[0]
            raise CheckError(f"{report.file}: none of {report.checked} records can be used; the first: {first}", first)
        if share_is_bad(len(report.problems), report.checked, sample_policy.max_bad_share):
            raise UnusableResultError(
                f"{report.file}: {len(report.problems)} of {report.checked} records cannot be used, more than "
                f"--max_bad_share {sample_policy.max_bad_share:g} allows; the first: {report.problems[0]}. Fix the "
                "data, or raise --max_bad_share if that many bad records are expected"
            )
    for sample_policy in sample_policies:
        sample_policy.probe()


def overlap(sample_policies: Sequence[SamplePolicy], reports: Sequence[CheckReport | None]) -> Iterator[str]:
    """One line per pair of data sets that share records (evaluation data must not be trained on)."""
    pairs = zip(sample_policies, reports, strict=True)
    checked = [(sample_policy.samples.unique, report) for sample_policy, report in pairs if report is not None]
    groups = (
        duplicate_groups([(samples, report.content_keys) for samples, report in checked]) if len(checked) > 1 else []
    )
    shared = Counter(pair for group in groups for pair in combinations(sorted({part for part, _ in group}), 2))
    for (one, other), count in sorted(shared.items()):
        names = f"{checked[one][1].file} and in {checked[other][1].file}"
        yield f"{count} records have the same text and media in {names}"


def check(
    samples: Sequence[Sample],
    length_policy: LengthPolicy,
    level: str | None = None,
    *,
    rebuild: bool = False,
    seen: Callable[[int, CachedCheck | DataError], object] | None = None,
) -> CheckReport:
    """Checks the records of a data set without decoding images; results of usable records are cached.

    Args:
        samples: the data set.
        length_policy: the encoder of the run and its policy for long samples.
        level: "full", "sample", or None for the default.
        rebuild: ignore cached results.
        seen: called with number and result of each record, in order.
    """
    started = time.perf_counter()
    samples = as_sample_set(samples).unique
    chosen = _chosen(len(samples), level)
    report = CheckReport(samples.title, len(samples), len(chosen))
    report.duplicates = _duplicates(samples, chosen)
    cache = CheckCache(samples.files, fingerprint(length_policy, samples), rebuild=rebuild)
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    with _threads() as pool, _progress_bar(len(chosen), report.file) as bar:
        checks = pool.map(lambda chunk: [_check_one(samples, index, length_policy, cache) for index in chunk], chunks)
        for chunk, results in zip(chunks, checks, strict=True):
            bar.update(len(results))
            for index, result in zip(chunk, results, strict=True):
                _enter(report, index, result)
                if seen is not None:
                    seen(index, result)
    report.reused = cache.reused
    cache.write()
    report.repeated = sum(len(group) - 1 for group in duplicate_groups([(samples, report.content_keys)]))
    report.seconds = time.perf_counter() - started
    return report


def _progress_bar(records: int, file: str) -> tqdm:
    # Fewer updates when stderr is a log file and not a terminal.
    pause = 0.2 if sys.stderr.isatty() else 10
    return tqdm(total=records, desc=f"checking {Path(file).name}", unit="record", delay=1, mininterval=pause)


def _chosen(records: int, level: str | None) -> Sequence[int]:
    """Numbers of the records to check: all, or evenly spaced ones."""
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
    """Threads, not processes: reading files and tokenizing both release the GIL."""
    pool = ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 2))
    try:
        yield pool
    finally:
        # After an interrupt, pending chunks are not checked.
        pool.shutdown(cancel_futures=True)


def _check_one(
    samples: Sequence[Sample], index: int, length_policy: LengthPolicy, cache: CheckCache
) -> CachedCheck | DataError:
    """The result of one record, from the cache when none of its files has changed."""
    if (known := cache.get(index)) is not None:
        return known
    try:
        sample = samples[index]
        fitted = length_policy.fit(sample)
        sample = length_policy.encoder.tools.expand(sample)  # tool calls are checked as text
    except DataError as error:
        return error
    prompt_tokenizer = length_policy.encoder.prompt_tokenizer
    units = [] if sample.timeline is None else rendered_units(fitted.rendered, prompt_tokenizer)
    size = length_policy.encoder.size_of(fitted.sample, fitted.plans, fitted.rendered)
    images, videos, audios = (sum(1 for _ in sample.media(kind)) for kind in MEDIA_KINDS)
    result = CachedCheck(
        fitted.outcome,
        fitted.longest,
        fitted.lost_media,
        trained=fitted.labelled_tokens,
        items=size.items,
        media=(images, videos, audios),
        notes=(*sample.notes, *suspicions(sample, prompt_tokenizer), *too_many_tokens(units)),
        content_key=content_key(sample),
        answer=last_answer(sample),
        decisions=counted(units) if units else (),
        pair=fitted.rejected is not None,
    )
    cache.put(index, result, [path for media in sample.media() for path in media.files])
    return result


def _enter(report: CheckReport, index: int, result: CachedCheck | DataError) -> None:
    if isinstance(result, OverlongError):
        report.overlong.append(str(result))
    elif isinstance(result, DataError):
        report.problems.append(str(result))
    else:
        report.enter(index, result)


def _duplicates(samples: SampleSet, chosen: Sequence[int]) -> dict[str, int]:
    """Ids that several of the checked records of a file share, with their count."""
    sources = {samples.source(index) for index in chosen}
    ids = Counter((source.file, source.id) for source in sources)
    return {identity: count for (_, identity), count in ids.items() if identity and count > 1}
