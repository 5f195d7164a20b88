"""report.html: the answers to look at, worst first, in one file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from finetune.evaluation.metrics import Metric
from finetune.evaluation.scoring import Row, change
from finetune.media import image as images
from finetune.media import video
from finetune.media.sampling import middles
from finetune.sample import Media, Sample, Source

_SIDE = 192
_MOST_IMAGES = 4
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid #ccc; padding: .5rem .7rem; text-align: left; vertical-align: top; }
table.summary { width: auto; margin-bottom: 1.5rem; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; }
td img { display: block; margin-bottom: .3rem; max-width: 192px; border: 1px solid #ddd; }
.better { background: #e8f4ea; } .worse { background: #fbeae7; } .quiet { color: #777; }
"""


def build(
    metric: Metric, rows: Sequence[Row], summary: Mapping[str, Any], *, title: str, most: int = 300, max_pixels: int
) -> str:
    """The page as HTML; every text of the data and of the model is escaped.

    Args:
        metric: what the scores are.
        rows: all rows; the worst are shown first.
        summary: ``scoring.summarise`` and whatever else is to stand at the top.
        title: headline.
        most: rows shown.
        max_pixels: largest image that is decoded.
    """
    shown = sorted(rows, key=lambda row: (-metric.badness(row.scores), change(metric, row), row.index))[:most]
    compared = rows[0].base is not None
    names = ["image", "question", "reference", "prediction", *(["base"] if compared else []), metric.name]
    body = "\n".join(_row(metric, row, max_pixels) for row in shown)
    count = f"{len(shown)} of {len(rows)} samples, worst first"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n{_summary(summary)}\n"
        f'<p class="quiet">{count}</p>\n<table>\n<tr>{"".join(f"<th>{escape(name)}</th>" for name in names)}</tr>\n'
        f"{body}\n</table>\n</body></html>\n"
    )


def _summary(summary: Mapping[str, Any]) -> str:
    scores, base = summary["scores"], summary.get("base", {})
    plain = {key: value for key, value in summary.items() if isinstance(value, (str, int, float)) and value != ""}
    facts = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in plain.items())
    head = "<tr><th></th><th>model</th>" + ("<th>base</th>" if base else "") + "</tr>"
    figures = "".join(
        f'<tr><td>{escape(key)}</td><td class="number">{value:.4f}</td>'
        + (f'<td class="number">{base[key]:.4f}</td>' if base else "")
        + "</tr>"
        for key, value in scores.items()
    )
    return f'<table class="summary">{head}{figures}</table>\n<table class="summary">{facts}</table>'


def _row(metric: Metric, row: Row, max_pixels: int) -> str:
    moved = change(metric, row)
    kind = ' class="better"' if moved > 0 else ' class="worse"' if moved < 0 else ""
    references = "\n".join(dict.fromkeys(row.references))
    score = f"{row.scores[metric.name]:.3f}"
    texts = [row.prompt.messages[-1].text.strip(), references, row.prediction]
    if row.base is not None:
        texts.append(row.base)
        score += f" (base {row.base_scores[metric.name]:.3f})"
    cells = "".join(f'<td class="text">{escape(text)}</td>' for text in texts)
    name = f'<span class="quiet">{escape(row.prompt.id)}</span>'
    return f'<tr{kind}><td>{_thumbnails(row.prompt, max_pixels)}{name}</td>{cells}<td class="number">{score}</td></tr>'


def _thumbnails(sample: Sample, max_pixels: int) -> str:
    media = [medium for medium in sample.media() if medium.kind != "audio"]
    tags = [_thumbnail(_picture(medium, sample.source, max_pixels)) for medium in media[:_MOST_IMAGES]]
    more = len(media) - _MOST_IMAGES
    return "".join(tags) + (f'<span class="quiet">and {more} more<br></span>' if more > 0 else "")


def _picture(medium: Media, source: Source, max_pixels: int) -> Image.Image:
    """An image, or three frames of a video side by side."""
    if medium.kind == "image":
        return images.load(medium, source, max_pixels)
    clip = video.probe(medium, source, max_pixels=max_pixels)
    with video.Decoder(clip, source) as decoder:
        frames = [decoder.take(index) for index in middles(range(clip.length.frames), min(3, clip.length.frames))]
    for frame in frames:
        frame.thumbnail((_SIDE, _SIDE))
    strip = Image.new("RGB", (sum(frame.width for frame in frames), frames[0].height))
    for place, frame in enumerate(frames):
        strip.paste(frame, (place * frame.width, 0))
    return strip


def _thumbnail(picture: Image.Image) -> str:
    picture.thumbnail((_SIDE, _SIDE))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=75)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}">'
