"""A look at the records before step 1: structure, image headers and lengths, all problems in one report."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from finetune.encoding.check_cache import CheckCache, Looked, fingerprint
from finetune.encoding.fitting import OUTCOMES, Fitter, OverlongError
from finetune.encoding.intake import Intake, share_is_bad, source_of
from finetune.errors import WorthlessError
from finetune.quoting import shown
from finetune.sample import MEDIA_KINDS, DataError, MediaKind, Sample
from finetune.templates.rendering import IGNORE

logger = logging.getLogger(__name__)

LEVELS = ("full", "sample", "off")
FULL_UP_TO = 20_000
"""Records of the largest data set that is checked in full by default."""
SAMPLED = 1_000
"""Records that a sampled check looks at."""

_A: dict[MediaKind, str] = {"image": "an image", "video": "a video", "audio": "sound"}
_SHOWN = 5
_CHUNK = 32


@dataclass(slots=True)
class Report:
    """What a check found.

    Attributes:
        file: the data file, or the names of the data sets.
        records: records in the data set.
        looked_at: records that were checked.
        seconds: time it took.
        outcomes: how many samples are kept, shrunk, ... as training will do.
        lost_images: images that go with dropped turns.
        longest: most tokens of a sample that stays.
        with_media: records that have an image, a video, a sound, by kind.
        notes: how many records have each note.
        left_out: messages of samples that are too long and left out.
        problems: messages of records that cannot be used.
        duplicates: ids that occur more than once, with their number.
        reused: records whose result was remembered from an earlier check.
    """

    file: str
    records: int
    looked_at: int
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    lost_images: int = 0
    longest: int = 0
    with_media: Counter[MediaKind] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)
    reused: int = 0

    def __str__(self) -> str:
        return "\n".join(_lines(self))


class CheckError(DataError):
    """Records that cannot be used, found before the first step."""


def check_before_training(intakes: Sequence[Intake], level: str | None) -> None:
    """Checks data sets, reports everything at once, and makes sure that each has a sample to use.

    Args:
        intakes: training and, where there is any, evaluation data.
        level: one of LEVELS, None for "full" up to FULL_UP_TO records and "sample" above.

    Raises:
        CheckError: records cannot be used and are not to be skipped; the report is logged before.
        WorthlessError: more of them cannot be used than the intake's share allows.
        DataError: a data set without any sample to use.
    """
    reports = []
    for intake in intakes:
        if level != "off":
            reports.append((intake, check(intake.samples, intake.fitter, level, rebuild=intake.remeasure)))
            logger.info("%s", reports[-1][1])
    fatal = [report for intake, report in reports if report.problems and intake.on_bad_sample == "error"]
    if fatal:
        count = sum(len(report.problems) for report in fatal)
        raise CheckError(
            f"{count} records cannot be used, the first: {fatal[0].problems[0]} (all kinds above; "
            "--on_bad_sample skip leaves such records out, --check off starts without looking)"
        )
    for intake, report in reports:
        if report.problems:
            logger.warning("%s: %d records will be left out", report.file, len(report.problems))
        if not report.outcomes.total():
            first = (report.problems + report.left_out)[0]
            raise CheckError(f"{report.file}: none of {report.looked_at} records can be used; the first: {first}")
        if share_is_bad(len(report.problems), report.looked_at, intake.max_bad_share):
            raise WorthlessError(
                f"{report.file}: {len(report.problems)} of {report.looked_at} records cannot be used, more than "
                f"--max_bad_share {intake.max_bad_share:g} allows; the first: {report.problems[0]}. Mend the data, or "
                "raise --max_bad_share if so many are expected to be unusable"
            )
    for intake in intakes:
        intake.probe()


def check(samples: Sequence[Sample], fitter: Fitter, level: str | None = None, *, rebuild: bool = False) -> Report:
    """Looks at the records of a data set without decoding an image; good ones are remembered.

    Args:
        samples: the data set.
        fitter: the encoder of the run and its policy for long samples.
        level: "full", "sample", or None for the default.
        rebuild: look again at good records that are remembered by the state of their files.
    """
    started = time.perf_counter()
    samples = getattr(samples, "once", samples)
    chosen = _chosen(len(samples), level)
    report = Report(_title(samples), len(samples), len(chosen))
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
        for results in pool.map(lambda chunk: [_look(samples, index, fitter, cache) for index in chunk], chunks):
            bar.update(len(results))
            for result in results:
                _enter(report, result)
    report.reused = cache.reused
    cache.write()
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


def _look(samples: Sequence[Sample], index: int, fitter: Fitter, cache: CheckCache) -> Looked | DataError:
    """What becomes of one record; of good ones from the cache, when none of their files has changed."""
    if (known := cache.get(index)) is not None:
        return known
    try:
        sample = samples[index]
        fitted = fitter.fit(sample)
    except DataError as error:
        return error
    paths = [path for media in sample.media() for path in media.files]
    size = fitter.encoder.measured(fitted.sample, fitted.plans, fitted.rendered)
    images, videos, sounds = (sum(1 for _ in sample.media(kind)) for kind in MEDIA_KINDS)
    looked = Looked(
        fitted.outcome,
        size.tokens,
        fitted.lost_images,
        trained=sum(label != IGNORE for label in fitted.rendered.labels),
        items=size.items,
        media=(images, videos, sounds),
        notes=sample.notes,
    )
    cache.put(index, looked, paths)
    return looked


def _enter(report: Report, result: Looked | DataError) -> None:
    if isinstance(result, OverlongError):
        report.left_out.append(str(result))
    elif isinstance(result, DataError):
        report.problems.append(str(result))
    else:
        report.outcomes[result.outcome] += 1
        report.lost_images += result.lost_images
        report.longest = max(report.longest, result.tokens)
        report.with_media.update(kind for kind, count in zip(MEDIA_KINDS, result.media, strict=True) if count)
        report.notes.update(set(result.notes))


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


def _lines(report: Report) -> Iterator[str]:
    part = "" if report.looked_at == report.records else f" of {report.records}, evenly spaced"
    known = f", {report.reused} of them known from before" if report.reused else ""
    yield f"check of {report.file}: {report.looked_at} records{part} in {report.seconds:.1f} s{known}"
    found = [f"{report.outcomes[outcome]} {outcome}" for outcome in OUTCOMES if report.outcomes[outcome]]
    found += [f"{len(report.left_out)} too long and left out"] if report.left_out else []
    found += [f"{len(report.problems)} that cannot be used"] if report.problems else []
    yield f"  {', '.join(found)}; longest {report.longest} tokens"
    used = report.outcomes.total()
    yield "  " + ", ".join(f"{report.with_media[kind]} of {used} have {a}" for kind, a in _A.items())
    for note, count in report.notes.most_common():
        yield f"  warning: {count} of {used} records: {note}"
    if report.lost_images:
        yield f"  warning: {report.lost_images} images go with turns that are dropped; later answers may refer to them"
    if report.duplicates:
        first = ", ".join(
            f"{shown(identity, 60)} ({count})" for identity, count in list(report.duplicates.items())[:_SHOWN]
        )
        yield f"  warning: {len(report.duplicates)} ids occur more than once: {first}{_more(report.duplicates)}"
    for kind, messages in group([*report.problems, *report.left_out]).items():
        yield f"  {len(messages)} x {kind}"
        yield from (f"      {message}" for message in messages[:_SHOWN])
        if len(messages) > _SHOWN:
            yield f"      ... and {len(messages) - _SHOWN} more"


def _more(found: Sequence[str] | dict[str, int]) -> str:
    return ", ..." if len(found) > _SHOWN else ""


def group(messages: Sequence[str]) -> dict[str, list[str]]:
    """Messages by kind, the most frequent first: the same words about other files, records, numbers and quotations."""
    kinds: dict[str, list[str]] = {}
    for message in messages:
        kinds.setdefault(shape(message), []).append(message)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def shape(message: str) -> str:
    """A message without what differs from record to record.

    >>> shape("d/a.json, record 3 (id 'x'): image /i/7.png has 5 x 5 = 25 pixels, the limit is 9")
    'image PATH has N x N = N pixels, the limit is N'
    """
    text = re.sub(r"^.*?, record \d+(?: \(id (?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")\))?: ", "", message, flags=re.S)
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'...'", text)
    # Lists of places differ in number; a path ends where our messages go on.
    text = re.sub(r"\(looked [^)]*\)", "(looked ...)", text)
    text = re.sub(r"(?<=\b(?:image|video|audio) )\S.*?(?= (?:cannot|is|has|does|begins|ends)\b)", "PATH", text)
    text = re.sub(r"\S*/\S*", "PATH", text)
    return re.sub(r"\d+(?:\.\d+)?", "N", text)
