"""``CheckReport``: the findings of a data check, and their text for the log."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from finetune.data_check.check_cache import CachedCheck
from finetune.data_check.decision_counts import Decisions, describe_decisions
from finetune.encoding.length_policy import OUTCOMES
from finetune.sample import MEDIA_KINDS, UNREAD, MediaKind
from finetune.utils.quoting import shown

_A: dict[MediaKind, str] = {"image": "an image", "video": "a video", "audio": "audio"}
_SHOWN = 5
# Fewest usable records for the warning that more than half of them have the same answer.
_ENOUGH = 20


@dataclass(slots=True)
class CheckReport:
    """The findings of a data check.

    Attributes:
        file: the data file, or the names of the data sets.
        records: number of records in the data set.
        checked: number of records that were checked.
        seconds: duration of the check.
        outcomes: number of usable samples per result of ``LengthPolicy``.
        lost_media: number of images, videos and audio clips in removed turns.
        longest: largest number of tokens of a usable sample, of a pair with the longer answer.
        pairs: number of preference pairs.
        with_media: number of records with an image, a video, audio, by kind.
        notes: number of records per note.
        content_keys: ``content_key`` of records by their number.
        repeated: number of records with the same text and media as an earlier one.
        answers: number of records per last trained answer.
        overlong: messages of samples that are too long and skipped.
        problems: messages of records that cannot be used.
        duplicates: ids that occur more than once, with their count.
        reused: number of records whose result came from the cache.
        duplex: number of full-duplex records.
        decisions: their decisions, as ``decision_counts.Decisions``.
    """

    file: str
    records: int
    checked: int
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    lost_media: int = 0
    longest: int = 0
    pairs: int = 0
    with_media: Counter[MediaKind] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    content_keys: dict[int, int] = field(default_factory=dict)
    repeated: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    overlong: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)
    reused: int = 0
    duplex: int = 0
    decisions: Decisions = (0, 0, 0, 0)

    def __str__(self) -> str:
        return "\n".join(lines(self))

    def enter(self, index: int, result: CachedCheck) -> None:
        """Adds the result of usable record ``index``."""
        self.outcomes[result.outcome] += 1
        self.lost_media += result.lost_media
        self.longest = max(self.longest, result.tokens)
        self.pairs += result.pair
        self.with_media.update(kind for kind, count in zip(MEDIA_KINDS, result.media, strict=True) if count)
        self.notes.update(set(result.notes))
        self.content_keys[index] = result.content_key
        if not result.decisions:
            self.answers[result.answer] += 1
            return
        self.duplex += 1
        units, speaking, turns, yielding = (a + b for a, b in zip(self.decisions, result.decisions, strict=True))
        self.decisions = (units, speaking, turns, yielding)

    @property
    def usable(self) -> int:
        """Number of usable records."""
        return self.outcomes.total()


def lines(report: CheckReport) -> Iterator[str]:
    """The report, line by line."""
    yield from _head(report)
    yield from _notes(report)
    for kind, messages in group([*report.problems, *report.overlong]).items():
        if len(messages) == 1:
            yield f"  1 x {messages[0]}"
            continue
        yield f"  {len(messages)} x {kind}"
        yield from (f"      {message}" for message in messages[:_SHOWN])
        if len(messages) > _SHOWN:
            yield f"      ... and {len(messages) - _SHOWN} more"


def lines_before_error(report: CheckReport, said: str) -> Iterator[str]:
    """The report, line by line, where an error follows it that says the message ``said``."""
    yield from _head(report)
    if not report.usable:
        return  # the error says that too
    for messages in group([*report.problems, *report.overlong]).values():
        others = [message for message in messages if message != said]
        yield from (f"  {message}" for message in others[:_SHOWN])
        if len(others) > _SHOWN:
            yield f"  ... and {len(others) - _SHOWN} more of this kind"


def _head(report: CheckReport) -> Iterator[str]:
    part = "" if report.checked == report.records else f" of {report.records}, evenly spaced"
    known = f", {report.reused} of them cached" if report.reused else ""
    yield f"check of {report.file}: {report.checked} records{part} in {report.seconds:.1f} s{known}"
    found = [f"{report.outcomes[outcome]} {outcome}" for outcome in OUTCOMES if report.outcomes[outcome]]
    found += [f"{len(report.overlong)} skipped as too long"] if report.overlong else []
    found += [f"{len(report.problems)} that cannot be used"] if report.problems else []
    used, media = report.usable, ""
    if used:
        counts = [(report.with_media[kind], a) for kind, a in _A.items() if report.with_media[kind]]
        media = ", ".join(f"{count} of {used} records have {a}" for count, a in counts)
        media = "; " + (media or f"none of {used} records has an image, a video or sound")
    longest = f"; longest {report.longest} tokens" if report.longest else ""
    pairs = f"; {report.pairs} pairs of answers" if report.pairs else ""
    yield f"  {', '.join(found)}{longest}{pairs}{media}"
    if report.duplex:
        yield from (f"  {line}" for line in describe_decisions(report.decisions, report.duplex))


def _notes(report: CheckReport) -> Iterator[str]:
    used = report.usable
    yield from (f"  {'warning' if is_warning(line) else 'note'}: {line}" for line in _note_lines(report.notes, used))
    if report.repeated:
        yield f"  warning: {report.repeated} of {used} records: duplicates, the same text and media as an earlier one"
    for answer, count in report.answers.most_common(1):
        if is_common(report, count):
            yield f"  warning: {count} of {used} records have the same last answer, {shown(answer, 60)}"
    if report.lost_media:
        lost = f"images, videos and audio in removed turns: {report.lost_media}"
        yield f"  warning: {lost}; later answers may refer to them"
    if report.duplicates:
        first = ", ".join(
            f"{shown(identity, 60)} ({count})" for identity, count in list(report.duplicates.items())[:_SHOWN]
        )
        yield f"  warning: ids that occur more than once: {first}{_more(report.duplicates)}"


def is_warning(note: str) -> bool:
    """Whether a note is a warning; a key that no reader uses is only a note, unless its name looks misspelt."""
    return UNREAD not in note or "did you mean" in note


def _note_lines(notes: Counter[str], used: int) -> Iterator[str]:
    """Notes with their counts; notes with the same text before the colon share a line."""
    said: dict[str, list[tuple[str, int]]] = {}
    for note, count in notes.most_common():
        head, _, thing = note.partition(": ")
        said.setdefault(head, []).append((thing, count))
    for head, things in said.items():
        if len(things) == 1:
            thing, count = things[0]
            yield f"{count} of {used} records: {head}" + (f": {thing}" if thing else "")
        else:
            yield f"{head}: " + ", ".join(f"{thing} ({count} of {used} records)" for thing, count in things)


def is_common(report: CheckReport, count: int) -> bool:
    """Whether one answer occurs in suspiciously many records."""
    return report.usable >= _ENOUGH and 2 * count > report.usable


def _more(found: Sequence[str] | dict[str, int]) -> str:
    return ", ..." if len(found) > _SHOWN else ""


def group(messages: Sequence[str]) -> dict[str, list[str]]:
    """Messages by ``shape`` (equal except for files, records, numbers and quotations), the most frequent first."""
    kinds: dict[str, list[str]] = {}
    for message in messages:
        kinds.setdefault(normalized_message(message), []).append(message)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


# Model names with a number, and tags, are kept.
_KEPT = r"MiniCPM-\w+ \d+(?:\.\d+)?|</?[\w|]+/?>"
# Quoted keys of records are kept; other quotations differ between records.
_KEY = r"\b(?:the key|call it) '[\w .-]{1,40}'"
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""


def normalized_message(message: str) -> str:
    """A message without the parts that differ between records.

    >>> normalized_message("d/a.json, record 3 (id 'x'): image /i/7.png has 5 x 5 = 25 pixels, the limit is 9")
    'image PATH has N x N = N pixels, the limit is N'
    >>> normalized_message("d/a.json, record 3: MiniCPM-V 4.6 takes 2 of them, and no answer is behind </think>")
    'MiniCPM-V 4.6 takes N of them, and no answer is behind </think>'
    """
    text = re.sub(rf"^.*?, record \d+(?: \(id (?:{_QUOTED})\))?: ", "", message, flags=re.S)
    text = re.sub(rf"({_KEY})|{_QUOTED}", lambda found: found[1] or "'...'", text)
    # A path ends where the text of our messages continues.
    text = re.sub(r"\(looked [^)]*\)", "(looked ...)", text)
    text = re.sub(r"(?<=\b(?:image|video|audio) )\S.*?(?= (?:cannot|is|has|does|begins|ends)\b)", "PATH", text)
    text = re.sub(rf"({_KEPT})|\S*/\S*", lambda found: found[1] or "PATH", text)
    return re.sub(rf"({_KEPT})|\d+(?:\.\d+)?", lambda found: found[1] or "N", text)
