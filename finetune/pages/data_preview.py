"""preview.html: samples as token sequences with loss mask and media, and statistics of the dataset."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from finetune.data_check.check_report import CheckReport, group, is_common, is_warning
from finetune.data_check.decision_counts import describe_decisions
from finetune.data_check.suspicious import suspicions
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import OUTCOMES, Fitted
from finetune.pages import charts, duplicates
from finetune.pages.html_page import PageError, count, render, write
from finetune.pages.long_text import shorten
from finetune.pages.model_view import ModelView, model_views
from finetune.pages.prompt_sections import prompt_sections
from finetune.pages.record_survey import CheckedDataset, choose, image_sides
from finetune.pages.thumbnails import Detail, EmbeddedImage, jpeg, weight, within
from finetune.pages.timeline_view import timeline_view
from finetune.sample import DataError, Sample, Text
from finetune.templates.prompt_types import IGNORE
from finetune.utils.errors import located
from finetune.utils.quoting import reason

SAMPLES = 50
"""Default number of samples on a page."""
_ROOM = 4_600_000
"""Byte budget for all samples of a page."""
_LISTED = 20
_OUTCOME_WORDS = {OUTCOMES[0]: "Kept whole"}
# Forms of records with what they are known by; docs/data.md has an example of each.
_FORMS = {
    "official": "official MiniCPM-V (conversations with tags)",
    "sharegpt": "ShareGPT (turns, and lists of files)",
    "alpaca": "Alpaca (instruction and output)",
    "openai": "OpenAI (messages of parts)",
    "duplex": "full duplex (a timeline)",
}


@dataclass(frozen=True, slots=True)
class FrameView:
    """A frame of a video: its time in words, the full frame, and its slices row by row."""

    time: str
    picture: EmbeddedImage
    rows: list[list[EmbeddedImage]]


@dataclass(frozen=True, slots=True)
class MediumView:
    """A media item as the page shows it; see ``ModelView``."""

    seen: ModelView
    whole: EmbeddedImage | None
    overview: EmbeddedImage | None
    rows: list[list[EmbeddedImage]]
    frames: list[FrameView]
    left_out: int

    @property
    def pictures(self) -> list[EmbeddedImage]:
        """All images of it on the page."""
        first = [each for each in (self.whole, self.overview) if each is not None]
        rows = [*self.rows, *(row for frame in self.frames for row in frame.rows)]
        return [*first, *(frame.picture for frame in self.frames), *(each for row in rows for each in row)]


def write_preview(path: Path, datasets: Sequence[CheckedDataset], *, most: int = SAMPLES, seed: int = 42) -> None:
    """Writes the page.

    Args:
        path: file of the page; an existing one is replaced.
        datasets: the checked datasets, all with the same encoder.
        most: maximum number of samples shown.
        seed: seed of the random choice of samples.

    Raises:
        PageError: it cannot be written.
    """
    chosen = choose(datasets, most, seed)
    room = _ROOM // max(len(chosen), 1)
    # Threads: decoding and compression release the GIL.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        samples = list(pool.map(lambda each: _sample(datasets[each[0][0]], each[0][1], each[1], room), chosen.items()))
    page = render(
        "preview",
        encoder=datasets[0].length_policy.encoder,
        policy=datasets[0].length_policy.policy,
        is_warning=is_warning,
        sets=[_set(part) for part in datasets],
        names=[PurePath(part.report.file).name for part in datasets],
        columns=[word for word in _row(datasets[0].report) if any(_row(part.report)[word] for part in datasets)],
        histograms=_histograms(datasets),
        repeated=(repeated := duplicates.find(datasets))[:_LISTED],
        repeated_count=len(repeated),
        across=sum(each.across for each in repeated),
        samples=samples,
        reasons=_reasons(samples),
        used=sum(len(part.survey.indices) for part in datasets),
        seed=seed,
    )
    try:
        write(path, page)
    except OSError as error:
        raise PageError(
            f"--html {path} cannot be written ({reason(error)}); give a file in a writable folder"
        ) from error


def _set(part: CheckedDataset) -> dict[str, Any]:
    """Check results of a dataset for the tables of the page."""
    report = part.report
    shown = list(group([*report.problems, *report.overlong]).items())
    return {
        "report": report,
        "used": report.outcomes.total(),
        "row": _row(report),
        "same": [(answer, number) for answer, number in report.answers.most_common(1) if is_common(report, number)],
        "lengths": None if part.lengths is None else textwrap.dedent(str(part.lengths)),
        "problems": [(kind, messages[:5], len(messages)) for kind, messages in shown],
        "decisions": list(describe_decisions(report.decisions, report.duplex)) if report.duplex else [],
        "ids": list(report.duplicates.items())[:_LISTED],
    }


def _row(report: CheckReport) -> dict[str, int]:
    """Counts of a dataset by name; a page shows those that are not 0 for every dataset."""
    part = report.checked != report.records
    return {
        "Records": report.records,
        "Looked at": report.checked * part,
        "With images": report.with_media["image"],
        "With videos": report.with_media["video"],
        "With audio": report.with_media["audio"],
        **{_OUTCOME_WORDS.get(outcome, outcome.capitalize()): report.outcomes[outcome] for outcome in OUTCOMES},
        "Skipped": len(report.overlong),
        "With an error": len(report.problems),
    }


def _histograms(datasets: Sequence[CheckedDataset]) -> list[charts.Histogram]:
    surveys = [part.survey for part in datasets]
    limit = datasets[0].length_policy.encoder.max_length

    def values(name: str) -> list[int]:
        return [value for survey in surveys for value in getattr(survey, name)]

    items = values("items")
    made = [
        charts.histogram("Length of samples in tokens", values("tokens"), "tokens", limit=limit),
        charts.histogram("Trained tokens per sample", values("trained"), "tokens"),
        charts.histogram("Slices and frames per sample", items, "slices") if any(items) else None,
        charts.histogram("Longer side of images in pixels", image_sides(datasets), "pixels"),
    ]
    return [chart for chart in made if chart is not None]


def _reasons(samples: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """Reasons why samples are shown, with their counts: the filters of the page."""
    words = [word for sample in samples for word in sample["tags"]]
    return [(word, words.count(word)) for word in dict.fromkeys(words)]


def _tags(reasons: Sequence[str]) -> list[str]:
    """The filters that a sample belongs to."""
    return list(dict.fromkeys("first of a kind" if reason.startswith("first") else reason for reason in reasons))


def _sample(part: CheckedDataset, index: int, reasons: list[str], room: int) -> dict[str, Any]:
    """One sample for the template."""
    encoder = part.length_policy.encoder
    source = part.records.source(index)
    shown: dict[str, Any] = {"reasons": reasons, "tags": _tags(reasons), "fault": ""}
    shown |= {"id": source.id, "source": str(source), "form": _FORMS.get(part.form(index), part.form(index))}
    try:
        with located(source):
            sample = part.records[index]
            fitted = part.length_policy.fit(sample)
            media = model_views(encoder, fitted)
            timeline = timeline_view(encoder, fitted)
    except DataError as error:
        # The check reads headers only, and files may have changed since then.
        return {**shown, "fault": str(error)}
    notes = (*sample.notes, *suspicions(sample, encoder.prompt_tokenizer))
    if "warning" not in reasons and any(map(is_warning, notes)):
        shown |= {"reasons": [*reasons, "warning"], "tags": _tags([*reasons, "warning"])}
    rendered = fitted.rendered
    prompt = prompt_sections(encoder, fitted, room // 2)
    spare = max(room - prompt.spent, room // 4)
    trained = sum(label != IGNORE for label in rendered.labels)
    return {
        **shown,
        "outcome": fitted.outcome,
        "tokens": len(rendered.input_ids),
        "trained": trained,
        "notes": notes,
        "lost": [(words, text and shorten(text, room // 8)) for words, text in _lost(encoder, sample, fitted)],
        "prompt": prompt,
        "timeline": timeline,
        "rejected": sample.rejected and shorten(sample.rejected.text, room // 8),
        "media": within(spare, lambda detail: _media(media, detail), _weight),
    }


def _media(media: Sequence[ModelView], detail: Detail) -> list[MediumView]:
    """The media at a level of detail; of too many images, full ones are kept before slices, and early before late."""
    wholes = min(sum(seen.whole is not None for seen in media), detail.tiles)
    left, views = detail.tiles - wholes, []
    for seen in media:
        whole = seen.whole if wholes > 0 else None
        wholes -= seen.whole is not None
        shown, frames = seen.items[:left], seen.frames[:left]
        left -= len(shown) + len(frames)
        slices = [
            (frame, frame.slices[: max(left - place * len(frame.slices), 0)]) for place, frame in enumerate(frames)
        ]
        left -= sum(len(own) for _, own in slices)
        columns = seen.grid[0] if seen.grid is not None else 1
        small = [jpeg(each, detail.tile, detail.quality) for each in shown]
        every = len(seen.items) + sum(1 + len(frame.slices) for frame in seen.frames)
        drawn = len(shown) + sum(1 + len(own) for _, own in slices)
        views.append(
            MediumView(
                seen,
                None if whole is None else jpeg(whole, detail.side, detail.quality),
                small[0] if small else None,
                _rows(small[1:], columns),
                [
                    FrameView(
                        f"{each.second:.1f} s",
                        jpeg(each.picture, detail.tile, detail.quality),
                        _rows([jpeg(one, detail.tile, detail.quality) for one in own], columns),
                    )
                    for each, own in slices
                ],
                every - drawn + (whole is not seen.whole),
            )
        )
    return views


def _rows(pictures: Sequence[EmbeddedImage], columns: int) -> list[list[EmbeddedImage]]:
    return [list(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]


def _weight(views: Sequence[MediumView]) -> int:
    return sum(weight(view.pictures) + len(view.seen.wave) for view in views)


def _lost(encoder: Encoder, sample: Sample, fitted: Fitted) -> list[tuple[str, str]]:
    """What was removed to fit the maximum length: sentences, each with the removed text."""
    if fitted.outcome == OUTCOMES[0]:
        return []
    removed = len(sample.messages) - len(fitted.sample.messages)
    start = next(place for place, message in enumerate(sample.messages) if message.role == "user")
    found = []
    if removed:
        gone = sample.messages[start : start + removed]
        media = f" with {count(fitted.lost_media, 'medium', 'media')}" if fitted.lost_media else ""
        text = "\n\n".join(f"{message.role}: {message.text}" for message in gone)
        found.append((f"{count(removed, 'turn')}{media} removed from the beginning", text))
    kept = sample.messages[:start] + sample.messages[start + removed :]
    for before, after in zip(kept, fitted.sample.messages, strict=True):
        taken = len(before.text) - len(after.text)
        if taken:
            found.append(
                (f"{count(taken, 'character')} truncated from a {before.role} turn", _taken(before.parts, taken))
            )
    wanted = encoder.plans(encoder.sizes(fitted.sample))
    items = [sum(getattr(plan, "items", 0) for plan in plans) for plans in (wanted, fitted.plans)]
    if items[0] != items[1]:
        found.append((f"images cut into {items[1]} slices in place of {items[0]}", ""))
    return found


def _taken(parts: Sequence[Any], characters: int) -> str:
    """The first ``characters`` characters of the texts of a turn."""
    return "".join(part.text for part in parts if isinstance(part, Text))[:characters]
