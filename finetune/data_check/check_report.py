"""What a check has found, as a user reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from finetune.data_check.check_cache import CachedCheck
from finetune.encoding.length_policy import OUTCOMES
from finetune.sample import MEDIA_KINDS, UNREAD, MediaKind
from finetune.utils.quoting import shown

_A: dict[MediaKind, str] = {"image": "an image", "video": "a video", "audio": "sound"}
_SHOWN = 5
# One answer for more than half of so many records is worth a word.
_ENOUGH = 20


@dataclass(slots=True)
class CheckReport:
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
        alike: the likeness of records by their number.
        repeated: records with the same text and media as an earlier one.
        answers: how often each last answer that is trained occurs.
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
    alike: dict[int, int] = field(default_factory=dict)
    repeated: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)
    reused: int = 0

    def __str__(self) -> str:
        return "\n".join(lines(self))

    def enter(self, index: int, looked: CachedCheck) -> None:
        """Counts a record that can be used, by its number."""
        self.outcomes[looked.outcome] += 1
        self.lost_images += looked.lost_images
        self.longest = max(self.longest, looked.tokens)
        self.with_media.update(kind for kind, count in zip(MEDIA_KINDS, looked.media, strict=True) if count)
        self.notes.update(set(looked.notes))
        self.alike[index] = looked.alike
        self.answers[looked.answer] += 1

    @property
    def usable(self) -> int:
        """Records that can be used."""
        return self.outcomes.total()


def lines(report: CheckReport) -> Iterator[str]:
    """The report, line by line."""
    part = "" if report.looked_at == report.records else f" of {report.records}, evenly spaced"
    known = f", {report.reused} of them known from before" if report.reused else ""
    yield f"check of {report.file}: {report.looked_at} records{part} in {report.seconds:.1f} s{known}"
    found = [f"{report.outcomes[outcome]} {outcome}" for outcome in OUTCOMES if report.outcomes[outcome]]
    found += [f"{len(report.left_out)} too long and left out"] if report.left_out else []
    found += [f"{len(report.problems)} that cannot be used"] if report.problems else []
    used, media = report.usable, ""
    if used:
        counts = [(report.with_media[kind], a) for kind, a in _A.items() if report.with_media[kind]]
        media = ", ".join(f"{count} of {used} records have {a}" for count, a in counts)
        media = "; " + (media or f"none of {used} records has an image, a video or sound")
    yield f"  {', '.join(found)}; longest {report.longest} tokens{media}"
    yield from (f"  {'warning' if is_warning(line) else 'note'}: {line}" for line in _note_lines(report.notes, used))
    if report.repeated:
        yield f"  warning: {report.repeated} records have the text and the media of an earlier one"
    for answer, count in report.answers.most_common(1):
        if is_common(report, count):
            yield f"  warning: {count} of {used} records have the same last answer, {shown(answer, 60)}"
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


def is_warning(note: str) -> bool:
    """Whether a note is about more than keys that nobody has to read."""
    return UNREAD not in note or "did you mean" in note


def _note_lines(notes: Counter[str], used: int) -> Iterator[str]:
    """Notes with their numbers; those that say the same of several things ("keys that nothing reads: 'a'") are one."""
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
    """Whether so many records are suspiciously many for one answer."""
    return report.usable >= _ENOUGH and 2 * count > report.usable


def _more(found: Sequence[str] | dict[str, int]) -> str:
    return ", ..." if len(found) > _SHOWN else ""


def group(messages: Sequence[str]) -> dict[str, list[str]]:
    """Messages by kind, the most frequent first: the same words about other files, records, numbers and quotations."""
    kinds: dict[str, list[str]] = {}
    for message in messages:
        kinds.setdefault(shape(message), []).append(message)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


# Names with a number in them, and tags, are neither numbers nor paths.
_KEPT = r"MiniCPM-\w+ \d+(?:\.\d+)?|</?[\w|]+/?>"
# Keys of records are names; other quotations differ from record to record.
_KEY = r"\b(?:the key|call it) '[\w .-]{1,40}'"
_QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""


def shape(message: str) -> str:
    """A message without what differs from record to record.

    >>> shape("d/a.json, record 3 (id 'x'): image /i/7.png has 5 x 5 = 25 pixels, the limit is 9")
    'image PATH has N x N = N pixels, the limit is N'
    >>> shape("d/a.json, record 3: MiniCPM-V 4.6 takes 2 of them, and no answer is behind </think>")
    'MiniCPM-V 4.6 takes N of them, and no answer is behind </think>'
    """
    text = re.sub(rf"^.*?, record \d+(?: \(id (?:{_QUOTED})\))?: ", "", message, flags=re.S)
    text = re.sub(rf"({_KEY})|{_QUOTED}", lambda found: found[1] or "'...'", text)
    # Lists of places differ in number; a path ends where our messages go on.
    text = re.sub(r"\(looked [^)]*\)", "(looked ...)", text)
    text = re.sub(r"(?<=\b(?:image|video|audio) )\S.*?(?= (?:cannot|is|has|does|begins|ends)\b)", "PATH", text)
    text = re.sub(rf"({_KEPT})|\S*/\S*", lambda found: found[1] or "PATH", text)
    return re.sub(rf"({_KEPT})|\d+(?:\.\d+)?", lambda found: found[1] or "N", text)
