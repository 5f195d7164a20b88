"""The timeline of a full-duplex record on a page: user audio, and what the model decides and says, second by second."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune.data_check.decision_counts import rendered_units
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import Fitted
from finetune.media import audio
from finetune.pages import charts
from finetune.sample import Track


@dataclass(frozen=True, slots=True)
class UnitView:
    """One second.

    Attributes:
        decision: "listens", "begins", "goes on", with "and ends" at the end of a turn.
        kind: "listen" or "speak", for the colour.
        text: what the model says.
        pictures: number of pictures in it.
    """

    decision: str
    kind: str
    text: str
    pictures: int


@dataclass(frozen=True, slots=True)
class TimelineView:
    """A timeline.

    Attributes:
        wave: the user audio as the points of an SVG polygon on a canvas of 240 x 100.
        units: its seconds.
    """

    wave: str
    units: list[UnitView]


def timeline_view(encoder: Encoder, fitted: Fitted) -> TimelineView | None:
    """The timeline of a sample; None for a conversation.

    Raises:
        DataError: its audio cannot be decoded.
    """
    timeline = fitted.sample.timeline
    if timeline is None:
        return None
    heard = [media for media in fitted.sample.media("audio") if isinstance(media.data, Track)]
    said: dict[int, str] = {}
    for turn in timeline.turns:
        said |= turn.texts()
    views = []
    for number, unit in enumerate(rendered_units(fitted.rendered, encoder.prompt_tokenizer)):
        words = "listens" if not unit.speaks else "begins" if unit.begins else "goes on"
        words += " and ends" if unit.ends else ""
        views.append(
            UnitView(
                words,
                "speak" if unit.speaks else "listen",
                said.get(number, ""),
                timeline.picture_units.count(number),
            )
        )
    waves = [audio.load(track) for track in heard] or [np.zeros(len(views), np.float32)]
    return TimelineView(charts.waveform(waves[0]), views)
