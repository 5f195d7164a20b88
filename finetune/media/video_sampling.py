"""Which frames of a video are looked at: numbers only (no pixels, no torch); the published rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from finetune.utils.errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoOptions:
    """How videos are looked at; None keeps the value of the checkpoint's generation.

    Attributes:
        fps: frames per second.
        max_frames: most frames of a video; where frames are packed, most groups.
        max_slice_nums: most slices per frame.
        max_pixels: frames of more pixels are shrunk to about so many before they are cut.
        packing: frames per group, whatever the rule says.
        max_packing: most frames per group.
        high_fps: whether short clips are sampled twice as densely, two frames per group.
        high_fps_below: seconds below which a clip is short.
        time_scale: seconds per time index.

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
    """How long a video is.

    Attributes:
        frames: their number, at least 1.
        fps: how many there are per second on average.
    """

    frames: int
    fps: float

    @property
    def duration(self) -> float:
        """Seconds, as the published code counts them."""
        return self.frames / self.fps


class Group(NamedTuple):
    """Frames that share a run of placeholders.

    Attributes:
        indices: which, counted from 0 in the order in which they are shown.
        times: time index of each, -1 where the family has none.
    """

    indices: tuple[int, ...]
    times: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Clip:
    """A video before its frames are decoded.

    Attributes:
        files: the video file, or the pictures that are its frames.
        length: number of frames and frames per second.
        size: (width, height) in pixels, turned as it is shown.
        pictures: whether the files are pictures.
    """

    files: tuple[Path, ...]
    length: Length
    size: tuple[int, int]
    pictures: bool = False


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames of a video that share a run of placeholders: a part of a conversation in place of its video.

    Attributes:
        clip: the video.
        indices: which frames.
        times: time index of each, -1 where the family has none.
        video: place of the video among those of the conversation.
        opens: whether they are the first of their video.
    """

    clip: Clip
    indices: tuple[int, ...]
    times: tuple[int, ...]
    video: int
    opens: bool


def frames_of(clip: Clip, groups: Sequence[Group], video: int = 0) -> tuple[Frames, ...]:
    """The parts that take the place of a video; ``video`` is its place among the videos of the conversation."""
    return tuple(Frames(clip, *group, video, place == 0) for place, group in enumerate(groups))


def middles(values: Sequence[int], count: int) -> list[int]:
    """The values in the middles of ``count`` equal segments.

    >>> middles(range(10), 4)
    [1, 3, 6, 8]
    """
    gap = len(values) / count
    return [values[int(index * gap + gap / 2)] for index in range(count)]


PER_SECOND = VideoOptions(fps=1.0, max_frames=64, max_slice_nums=1)
"""What MiniCPM-V 2.6 and 4.0 and the o models are published with."""


def per_second(length: Length, options: VideoOptions) -> list[Group]:
    """Single frames, so many per second; of more than the limit those in the middles of equal segments.

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
"""What MiniCPM-V 4.5 is published with."""

_HIGH_FPS_UP_TO = 5
"""Frames per second above which nothing is doubled."""


def packed(length: Length, options: VideoOptions) -> list[Group]:
    """Frames in the middles of equal segments, several of them to a group when the clip is long.

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
    """How many frames, and how many of them to a group."""
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
    """The time index nearest to a time stamp; only those inside the clip count, and of two equally near the earlier."""
    last = max(math.ceil(duration / scale) - 1, 0)
    below = min(int(seconds / scale), last)
    near = [index for index in (below - 1, below, below + 1) if 0 <= index <= last]
    best = min(near, key=lambda index: abs(index * scale - seconds))
    # Not the index itself: the published code goes by way of the time, and rounding decides.
    return int(best * scale / scale)


PROCESSOR_SAMPLING = VideoOptions(max_frames=128, max_slice_nums=9)
"""What the video processor of transformers for MiniCPM-V 4.6 has where a checkpoint says nothing."""


def processor_sampling(length: Length, options: VideoOptions) -> list[Group]:
    """One frame per second; of a clip of more seconds than the limit so many frames, evenly spaced.

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
    """``count`` places from the first to the last of ``length``, evenly, rounded down."""
    step = (length - 1) / max(count - 1, 1)
    return [int(place * step) for place in range(count - 1)] + [length - 1 if count > 1 else 0]
