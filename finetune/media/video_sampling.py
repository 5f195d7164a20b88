"""Frame sampling rules of the published models: frame indices by number of frames and fps (no pixels, no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from finetune.utils.errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoOptions:
    """Video options (``--video_*``); None keeps the value of the checkpoint or its family.

    Attributes:
        fps: sampled frames per second.
        max_frames: maximum number of frames of a video; with packed frames, of groups.
        max_slice_nums: maximum number of slices per frame.
        max_pixels: larger frames are downscaled to at most this many pixels before slicing.
        packing: fixed number of frames per group, in place of the sampling rule.
        max_packing: maximum number of frames per group.
        high_fps: whether short clips are sampled at twice the rate, two frames per group.
        high_fps_below: duration in seconds below which a clip is short.
        time_scale: seconds per temporal index.

    Raises:
        ArgumentError: a value of 0 or less, or that is not finite.
    """

    fps: float | None = None
    max_frames: int | None = None
    max_slice_nums: int | None = None
    max_pixels: int | None = None
    packing: int | None = None
    max_packing: int | None = None
    high_fps: bool | None = None
    high_fps_below: float | None = None
    time_scale: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            if value is not True and value is not False and not 0 < value < math.inf:
                raise ArgumentError(f"videos: {name} is {value}; it must be a number above 0")

    @property
    def given(self) -> dict[str, Any]:
        """The options that have a value."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, defaults: VideoOptions) -> VideoOptions:
        """These options where they have a value, else the defaults."""
        return replace(defaults, **self.given)


class Length(NamedTuple):
    """The length of a video.

    Attributes:
        frames: number of frames, at least 1.
        fps: average frames per second.
    """

    frames: int
    fps: float

    @property
    def duration(self) -> float:
        """Duration in seconds, computed as in the published code."""
        return self.frames / self.fps


class Group(NamedTuple):
    """Frames that share a placeholder run.

    Attributes:
        indices: frame indices from 0, in presentation order.
        times: temporal index of each, -1 where the family has none.
    """

    indices: tuple[int, ...]
    times: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Clip:
    """A video before its frames are decoded.

    Attributes:
        files: the video file, or the image files of its frames.
        length: number of frames and frames per second.
        size: (width, height) in pixels, with rotation applied.
        from_images: whether the files are images.
    """

    files: tuple[Path, ...]
    length: Length
    size: tuple[int, int]
    from_images: bool = False


@dataclass(frozen=True, slots=True)
class Frames:
    """A group of video frames as a part of a conversation; the groups of a video replace it.

    Attributes:
        clip: the video.
        indices: frame indices.
        times: temporal index of each, -1 where the family has none.
        video: number of the video in the conversation.
        opens: whether it is the first group of its video.
    """

    clip: Clip
    indices: tuple[int, ...]
    times: tuple[int, ...]
    video: int
    opens: bool


def frames_of(clip: Clip, groups: Sequence[Group], video: int = 0) -> tuple[Frames, ...]:
    """The parts that replace a video; ``video`` is its number in the conversation."""
    return tuple(Frames(clip, *group, video, place == 0) for place, group in enumerate(groups))


def middles(values: Sequence[int], count: int) -> list[int]:
    """The values in the middles of ``count`` equal segments.

    >>> middles(range(10), 4)
    [1, 3, 6, 8]
    """
    gap = len(values) / count
    return [values[int(index * gap + gap / 2)] for index in range(count)]


PER_SECOND = VideoOptions(fps=1.0, max_frames=64, max_slice_nums=1)
"""Published defaults of MiniCPM-V 2.6 and 4.0 and MiniCPM-o."""


def per_second(length: Length, options: VideoOptions) -> list[Group]:
    """Single frames at ``fps``; above ``max_frames``, the middle frames of equal segments.

    >>> [group.indices[0] for group in per_second(Length(100, 25.0), PER_SECOND)]
    [0, 25, 50, 75]
    """
    options = options.over(PER_SECOND)
    assert options.fps is not None
    assert options.max_frames is not None
    chosen = range(0, length.frames, max(round(length.fps / options.fps), 1))
    indices = chosen if len(chosen) <= options.max_frames else middles(chosen, options.max_frames)
    return [Group((index,), (-1,)) for index in indices]


PACKED = VideoOptions(
    fps=3.0,
    max_frames=180,
    max_slice_nums=1,
    max_packing=3,
    high_fps=False,
    high_fps_below=30.0,
    time_scale=0.1,
)
"""Published defaults of MiniCPM-V 4.5."""

_HIGH_FPS_UP_TO = 5
"""Largest fps that ``high_fps`` doubles."""


def packed(length: Length, options: VideoOptions) -> list[Group]:
    """Middle frames of equal segments, packed into groups of several frames when the clip is long.

    >>> packed(Length(20, 10.0), PACKED)[:2]
    [Group(indices=(1,), times=(1,)), Group(indices=(5,), times=(5,))]
    >>> [len(group.indices) for group in packed(Length(3000, 30.0), PACKED)] == [2] * 150
    True
    """
    options = options.over(PACKED)
    count, packing = _packed_count(length, options)
    count = min(max(count, 1), length.frames)
    assert options.max_packing is not None
    assert options.time_scale is not None
    if options.packing is not None:
        packing = min(options.packing, options.max_packing)
    indices = middles(range(length.frames), count)
    times = [_time(index / length.fps, length.duration, options.time_scale) for index in indices]
    starts = range(0, count, packing)
    return [Group(tuple(indices[at : at + packing]), tuple(times[at : at + packing])) for at in starts]


def _packed_count(length: Length, options: VideoOptions) -> tuple[int, int]:
    """Number of frames, and frames per group."""
    fps, most, most_packing = options.fps, options.max_frames, options.max_packing
    assert fps is not None
    assert most is not None
    assert most_packing is not None
    assert options.high_fps_below is not None
    duration = length.duration
    if options.high_fps and duration < options.high_fps_below and fps <= _HIGH_FPS_UP_TO:
        frames = round(min(2 * fps, round(length.fps)) * min(most, duration))
        return min(frames, most * most_packing), min(2, most_packing)
    if fps * int(duration) <= most:
        return round(min(fps, round(length.fps)) * min(most, duration)), 1
    packing = math.ceil(duration * fps / most)
    if packing <= most_packing:
        return round(duration * fps), packing
    return most * most_packing, most_packing


def _time(seconds: float, duration: float, scale: float) -> int:
    """The temporal index inside the clip that is nearest to a time stamp; the earlier one of two."""
    last = max(math.ceil(duration / scale) - 1, 0)
    below = min(int(seconds / scale), last)
    near = [index for index in (below - 1, below, below + 1) if 0 <= index <= last]
    best = min(near, key=lambda index: abs(index * scale - seconds))
    # Not simply ``best``: the published code converts to seconds and back, with rounding.
    return int(best * scale / scale)


PROCESSOR_SAMPLING = VideoOptions(max_frames=128, max_slice_nums=9)
"""Defaults of transformers' video processor for MiniCPM-V 4.6."""


def processor_sampling(length: Length, options: VideoOptions) -> list[Group]:
    """Sampling of transformers' video processor: one frame per second; above ``max_frames``, evenly spaced frames.

    >>> [group.indices[0] for group in processor_sampling(Length(75, 30.0), PROCESSOR_SAMPLING)]
    [0, 30, 60]
    """
    options = options.over(PROCESSOR_SAMPLING)
    most = options.max_frames
    assert most is not None
    if length.duration > most:
        steps = [round(step * 0.1, 1) for step in range(int(length.duration / 0.1))]
        indices = [int(step * length.fps) for step in steps]
        if len(indices) > most:
            indices = [indices[place] for place in _spaced(len(indices), most)]
    else:
        indices = [int(second * length.fps) for second in range(math.ceil(length.duration))]
    return [Group((min(index, length.frames - 1),), (-1,)) for index in indices]


def _spaced(length: int, count: int) -> list[int]:
    """``count`` evenly spaced indices from the first to the last of ``length``, rounded down."""
    step = (length - 1) / max(count - 1, 1)
    return [int(place * step) for place in range(count - 1)] + [length - 1 if count > 1 else 0]
