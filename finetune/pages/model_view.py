"""What the model receives of each medium: images and frames rebuilt from the input patches, and waveforms."""

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
    """A frame of a video: its time in seconds, the full image and its slices, row by row, as the model gets them."""

    second: float
    picture: Image.Image
    slices: list[Image.Image] = field(default_factory=list)


@dataclass(slots=True)
class ModelView:
    """A media item and the model inputs made of it.

    Attributes:
        kind: "image", "video" or "audio".
        words: its description in the prompt.
        name: its file name, or a note that it has none.
        whole: the original image, downscaled to the size of the page; None for other media.
        grid: columns and rows of its slices.
        items: of an image, its thumbnail, then its slices row by row.
        frames: of a video.
        wave: waveform of audio, as the points of an SVG polygon.
        seconds: duration of audio.
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


def model_views(encoder: Encoder, fitted: Fitted) -> list[ModelView]:
    """The media of a sample in reading order.

    Raises:
        DataError: a media item cannot be decoded.
    """
    sample = fitted.sample
    example = encoder.assemble(sample, fitted.plans, fitted.rendered)
    found = [
        ModelView(medium.kind, place.words, str(medium))
        for medium, place in zip(sample.media(), places(encoder, fitted), strict=True)
    ]
    for medium, seen in zip(sample.media(), found, strict=True):
        if medium.kind == "image":
            seen.whole = image.load(medium, encoder.refuse_above_pixels).copy()
            # No page shows more pixels, and it may be downscaled repeatedly until it fits.
            seen.whole.thumbnail((DETAILS[0].side, DETAILS[0].side), reducing_gap=2.0)
        elif medium.kind == "audio" and encoder.audio_spec is not None:
            wave = audio.load(medium)
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
    """A group of frames: the full images of all, then the first slices of all, and so on."""
    seen.grid = cuts.grid
    own = [Frame(index / frames.clip.length.fps, next(pictures)) for index in frames.indices]
    for _ in range(cuts.items - 1):
        for frame in own:
            frame.slices.append(next(pictures))
    seen.frames += own


def _items(example: Example, side: int) -> Iterator[Image.Image]:
    """The visual items of an example, reassembled from its patches."""
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
