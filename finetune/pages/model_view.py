"""What the model sees and hears of a sample, taken from the very tensors that it gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.encoding.length_policy import Fitted
from finetune.media import audio, image
from finetune.media.slicing import SlicePlan, item_sizes
from finetune.media.video_sampling import Frames
from finetune.pages import charts
from finetune.pages.decoded_prompt import places, spread_out
from finetune.pages.thumbnails import DETAILS
from finetune.sample import Media


@dataclass(slots=True)
class Frame:
    """A frame of a video: its second, and its whole picture as the model gets it."""

    second: float
    picture: Image.Image


@dataclass(slots=True)
class ModelView:
    """A medium and what the model gets of it.

    Attributes:
        kind: "image", "video" or "audio".
        words: as in the conversation.
        name: of its file, or that it has none.
        whole: the image as it is, but not larger than a page shows it; of other media None.
        grid: columns and rows into which it is cut.
        items: of an image, its overview and then its slices row by row.
        frames: of a video.
        wave: outline of sound, as the points of an SVG polygon.
        seconds: length of sound.
    """

    kind: str
    words: str
    name: str
    whole: Image.Image | None = None
    grid: tuple[int, int] | None = None
    items: list[Image.Image] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    wave: str = ""
    seconds: float = 0.0


def see(encoder: Encoder, fitted: Fitted) -> list[ModelView]:
    """The media of a sample in reading order.

    Raises:
        DataError: one that cannot be decoded.
    """
    sample = fitted.sample
    example = encoder.assemble(sample, fitted.plans, fitted.rendered)
    found = [
        ModelView(medium.kind, place.words, str(medium))
        for medium, place in zip(sample.media(), places(encoder, fitted), strict=True)
    ]
    for medium, seen in zip(sample.media(), found, strict=True):
        if medium.kind == "image":
            seen.whole = image.load(medium, sample.source, encoder.max_pixels).copy()
            # No page shows more, and it may be shrunk several times until it fits.
            seen.whole.thumbnail((DETAILS[0].side, DETAILS[0].side), reducing_gap=2.0)
        elif medium.kind == "audio" and encoder.audio_spec is not None:
            wave = audio.load(medium, sample.source)
            seen.wave, seen.seconds = charts.waveform(wave), len(wave) / encoder.audio_spec.rate
    pictures = _items(example, encoder.slicing.patch_size)
    current = iter(seen for seen in found if seen.kind != "audio")
    video: ModelView | None = None
    for part, cuts in spread_out(encoder, sample, fitted.plans).visual():
        if isinstance(part.data, Frames):
            video = next(current) if part.data.opens or video is None else video
            _take_frames(video, part.data, cuts, pictures)
        else:
            _take_items(next(current), part, cuts, pictures)
    return found


def _take_items(seen: ModelView, part: Media, cuts: SlicePlan, pictures: Iterator[Image.Image]) -> None:
    seen.grid = cuts.grid
    seen.items = [next(pictures) for _ in item_sizes(cuts)]


def _take_frames(seen: ModelView, frames: Frames, cuts: SlicePlan, pictures: Iterator[Image.Image]) -> None:
    """The whole pictures of a group of frames; behind them stand their slices."""
    seen.grid = cuts.grid
    shown = [next(pictures) for _ in frames.indices]
    for index, picture in zip(frames.indices, shown, strict=True):
        seen.frames.append(Frame(index / frames.clip.length.fps, picture))
    for _ in range((cuts.items - 1) * len(frames.indices)):
        next(pictures)


def _items(example: Example, side: int) -> Iterator[Image.Image]:
    """The visual items of an example, its patches put together again."""
    patches = example.patches.numpy()
    if patches.dtype != np.uint8:
        patches = ((patches * 0.5 + 0.5) * 255).round().clip(0, 255).astype(np.uint8)
    start = 0
    for rows, columns in example.tgt_sizes.tolist():
        own = patches[start : start + rows * columns].reshape(rows, columns, 3, side, side)
        start += rows * columns
        yield Image.fromarray(
            np.ascontiguousarray(own.transpose(0, 3, 1, 4, 2)).reshape(rows * side, columns * side, 3)
        )
