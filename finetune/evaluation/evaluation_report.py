"""report.html of ``evaluate``: samples sorted by score, worst first, as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.evaluation.metrics import Metric
from finetune.evaluation.metrics.boxes import Box, Point, boxes, points
from finetune.evaluation.scoring import ScoreRow, change
from finetune.media import image as images
from finetune.media import video
from finetune.media.video_sampling import middles
from finetune.pages.html_page import count, render
from finetune.pages.thumbnails import Detail, EmbeddedImage, jpeg, weight, within
from finetune.sample import Media, Sample
from finetune.utils.errors import located

_MOST_IMAGES = 4
_ROOM = 9_000_000
"""Byte budget for all images of a page; exceeded only at the coarsest detail."""
_TEXT_ROOM = 6_000_000
"""Byte budget for all texts of a page."""
_FRAME = 320
_SCALE = 1000
"""Coordinates of boxes and points go from 0 to this, whatever the size of the image."""
_WORDS = {
    "exact": "Exact match",
    "normalised": "Match but for case, articles and punctuation",
    "vqa": "VQA accuracy",
    "anls": "ANLS (edit-distance similarity)",
    "relaxed": "Relaxed accuracy (numbers within 5 %)",
    "token_f1": "F1 of the words",
    "cer": "Character error rate",
    "wer": "Word error rate",
    "rouge_l": "ROUGE-L",
    "choice": "Right option",
    "box_iou": "Overlap of the boxes (IoU)",
    "point_in_box": "Points inside the box",
    "json_f1": "F1 of the JSON fields",
}
_FACTS = {
    "model": "Model",
    "adapter": "Adapter",
    "compared_with": "Compared with",
    "data": "Data",
    "left_out": "Records skipped",
    "seconds": "Seconds",
}
_SAID = ("metric", "why", "higher_is_better", "samples", "better", "worse", "other_answer")
"""Keys of the summary that are shown elsewhere than in the table of facts."""


def build(
    metric: Metric,
    rows: Sequence[ScoreRow],
    summary: Mapping[str, Any],
    *,
    title: str,
    most: int = 300,
    max_pixels: int,
) -> str:
    """The page as HTML; every text of the data and of the model is escaped.

    Args:
        metric: the metric of the scores.
        rows: all rows; the worst are shown first.
        summary: that of ``scoring.summarise``, with further entries to show at the top.
        title: headline.
        most: maximum number of rows shown.
        max_pixels: maximum pixels of an image to decode.
    """
    shown = sorted(rows, key=lambda row: (-metric.sort_key(row.scores), change(metric, row), row.index))[:most]
    thumbnails = _Thumbnails(max_pixels, _ROOM // max(len(shown), 1))
    cards = [_card(metric, row, thumbnails) for row in shown]
    tags = [tag for card in cards for tag in card["tags"]]
    return render(
        "evaluation",
        title=title,
        total=len(rows),
        cards=cards,
        text_room=_TEXT_ROOM // max(sum(len(each["earlier"]) + len(each["references"]) + 3 for each in cards), 1),
        compared=rows[0].compared is not None,
        summary=summary,
        figures=[_figure(name, value, summary.get("base", {}).get(name)) for name, value in summary["scores"].items()],
        facts=[(_FACTS.get(key, key.replace("_", " ").capitalize()), value) for key, value in _facts(summary)],
        judged=_judged(metric, summary),
        direction=_direction(metric),
        filters=[(tag, tags.count(tag)) for tag in ("better", "worse", "changed", "unchanged") if tag in tags],
        drawn=any(card["drawn"] for card in cards),
    )


def words_of(figure: str) -> str:
    """Display name of a metric.

    >>> words_of("cer"), words_of("acc@0.5"), words_of("mine")
    ('Character error rate', 'Boxes that overlap by more than 0.5', 'mine')
    """
    name, at, limit = figure.partition("@")
    return f"Boxes that overlap by more than {limit}" if at and name == "acc" else _WORDS.get(figure, figure)


def _figure(name: str, value: float, base: float | None) -> dict[str, Any]:
    return {"words": words_of(name), "value": value, "base": base, "moved": None if base is None else value - base}


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in summary.items():
        if key not in _SAID and isinstance(value, (str, int, float)) and value != "":
            yield key, str(value)


def _judged(metric: Metric, summary: Mapping[str, Any]) -> str:
    """One sentence on the metric."""
    why = str(summary.get("why", ""))
    chosen = f"; chosen automatically: {why.removeprefix('auto: ')}" if why.startswith("auto: ") else ""
    return f"{words_of(metric.name)}; {_direction(metric)}{chosen}"


def _direction(metric: Metric) -> str:
    return "higher is better" if metric.higher else "lower is better"


@dataclass(frozen=True, slots=True)
class _Thumbnails:
    """The thumbnails of a page; questions about the same files share them.

    Attributes:
        max_pixels: maximum pixels of an image to decode.
        room: bytes for those of one question.
        made: those so far, by their files.
    """

    max_pixels: int
    room: int
    made: dict[tuple[Path, ...], list[EmbeddedImage]] = field(default_factory=dict)

    def of(self, sample: Sample) -> list[EmbeddedImage]:
        """Those of a conversation."""
        data = [medium.data for medium in sample.media()]
        files = tuple(each for each in data if isinstance(each, Path))
        if len(files) == len(data) and files in self.made:
            return self.made[files]
        sources = list(pictures_of(sample, self.max_pixels))
        made = within(self.room, lambda detail: _shown(sources, detail), weight)
        if len(files) == len(data):
            self.made[files] = made
        return made


def _card(metric: Metric, row: ScoreRow, thumbnails: _Thumbnails) -> dict[str, Any]:
    moved = change(metric, row)
    compared = row.compared is not None
    changed = [] if not compared else ["unchanged" if row.compared == row.prediction else "changed"]
    verdict = ["better"] if moved > 0 else ["worse"] if moved < 0 else []
    drawing = _drawing(row) if sum(1 for _ in row.prompt.media()) == 1 else []
    return {
        "id": row.prompt.id,
        "source": str(row.prompt.source),
        "tags": [*verdict, *changed],
        "verdict": verdict[0] if verdict else "",
        "score": row.scores[metric.name],
        "base_score": row.compared_scores[metric.name] if compared else None,
        "earlier": [(message.role, message.text.strip()) for message in row.prompt.messages[:-1]],
        "question": row.prompt.messages[-1].text.strip(),
        "references": list(dict.fromkeys(row.references)),
        "prediction": row.prediction,
        "base": row.compared,
        "pictures": thumbnails.of(row.prompt),
        "more": max(sum(medium.kind != "audio" for medium in row.prompt.media()) - _MOST_IMAGES, 0),
        "sounds": sum(1 for _ in row.prompt.media("audio")),
        "drawn": drawing,
    }


def _shown(pictures: Sequence[Image.Image], detail: Detail) -> list[EmbeddedImage]:
    return [jpeg(picture, detail.side, detail.quality) for picture in pictures]


def _drawing(row: ScoreRow) -> list[tuple[str, list[Box], list[Point]]]:
    """Boxes and points of references and answers in thousandths; empty when they use another unit."""
    texts = [("reference", "\n".join(row.references)), ("answer", row.prediction)]
    texts += [("base", row.compared)] if row.compared is not None else []
    drawn = [(kind, boxes(text), points(text) if "<point>" in text else []) for kind, text in texts]
    numbers = [value for _, found, dots in drawn for each in (*found, *dots) for value in each]
    if not any(value > _SCALE or value < 0 for value in numbers):
        return drawn if numbers else []
    # The references determine the unit; an answer may be anything.
    known = [value for each in (*drawn[0][1], *drawn[0][2]) for value in each]
    return drawn if known and all(0 <= value <= _SCALE for value in known) else []


def pictures_of(sample: Sample, max_pixels: int) -> Iterator[Image.Image]:
    """The first few images of a conversation; of a video three of its frames.

    Raises:
        DataError: one cannot be decoded.
    """
    media = [medium for medium in sample.media() if medium.kind != "audio"]
    for medium in media[:_MOST_IMAGES]:
        with located(sample.source):
            picture = _picture(medium, max_pixels)
        yield picture


def _picture(medium: Media, max_pixels: int) -> Image.Image:
    """An image, or three frames of a video side by side."""
    if medium.kind == "image":
        return images.load(medium, max_pixels)
    clip = video.probe(medium, max_pixels=max_pixels)
    with video.Decoder(clip) as decoder:
        frames = [decoder.take(index) for index in middles(range(clip.length.frames), min(3, clip.length.frames))]
    for frame in frames:
        frame.thumbnail((_FRAME, _FRAME))
    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
    for place, frame in enumerate(frames):
        strip.paste(frame, (place * frame.width, 0))
    return strip


def headline(data: str, questions: int) -> str:
    """Title of an evaluation.

    >>> headline("eval.json", 128)
    'Answers to 128 questions of eval.json'
    """
    return f"Answers to {count(questions, 'question')} of {data}"
