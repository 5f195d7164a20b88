"""Frames are chosen by the published rules: figures worked out by hand, and the processor of transformers."""

from __future__ import annotations

import random

import pytest
from transformers import MiniCPMV4_6VideoProcessor
from transformers.video_utils import VideoMetadata

from finetune.media.video_sampling import (
    PACKED,
    PER_SECOND,
    Group,
    Length,
    VideoOptions,
    packed,
    per_second,
    processor_sampling,
)
from finetune.utils.errors import ArgumentError


def indices(groups: list[Group]) -> list[int]:
    return [index for group in groups for index in group.indices]


@pytest.mark.parametrize(
    ("length", "options", "chosen"),
    [
        (Length(100, 25.0), VideoOptions(), [0, 25, 50, 75]),
        (Length(10, 29.97), VideoOptions(), [0]),
        (Length(100, 29.97), VideoOptions(), [0, 30, 60, 90]),
        (Length(8, 0.25), VideoOptions(), list(range(8))),
        (Length(100, 25.0), VideoOptions(fps=5.0), list(range(0, 100, 5))),
        (Length(100, 25.0), VideoOptions(fps=99.0, max_frames=4), [12, 37, 62, 87]),
        # 200 seconds in 64 equal parts: the middle second of each.
        (Length(2000, 10.0), VideoOptions(), [10 * int(k * 3.125 + 1.5625) for k in range(64)]),
    ],
)
def test_per_second(length: Length, options: VideoOptions, chosen: list[int]) -> None:
    groups = per_second(length, options.over(PER_SECOND))
    assert indices(groups) == chosen
    assert all(group.times == (-1,) for group in groups)


@pytest.mark.parametrize(
    ("length", "options", "frames", "packing"),
    [
        (Length(300, 30.0), VideoOptions(), 30, 1),
        (Length(1800, 30.0), VideoOptions(), 180, 1),  # 60 s: the last that fits frame by frame
        (Length(1830, 30.0), VideoOptions(), 183, 2),
        (Length(5400, 30.0), VideoOptions(), 540, 3),
        (Length(54000, 30.0), VideoOptions(), 540, 3),
        (Length(20, 2.0), VideoOptions(), 20, 1),  # never more than the clip has per second
        (Length(3, 30.0), VideoOptions(), 1, 1),
        (Length(300, 30.0), VideoOptions(packing=2), 30, 2),
        (Length(300, 30.0), VideoOptions(packing=6), 30, 3),
        (Length(300, 30.0), VideoOptions(high_fps=True), 60, 2),
        (Length(900, 30.0), VideoOptions(high_fps=True), 90, 1),  # 30 s are not short
        (Length(300, 30.0), VideoOptions(high_fps=True, fps=15.0), 150, 1),  # nor is anything above 5 per second
        (Length(300, 30.0), VideoOptions(high_fps=True, fps=5.0, high_fps_below=10.0), 50, 1),
        (Length(300, 30.0), VideoOptions(fps=15.0, max_frames=128, max_packing=3), 150, 2),
    ],
)
def test_packed(length: Length, options: VideoOptions, frames: int, packing: int) -> None:
    groups = packed(length, options.over(PACKED))
    chosen = indices(groups)
    gap = length.frames / frames
    assert chosen == [int(k * gap + gap / 2) for k in range(frames)]
    assert {len(group.indices) for group in groups[:-1]} <= {packing}
    assert 1 <= len(groups[-1].indices) <= packing
    for group in groups:
        for index, time in zip(group.indices, group.times, strict=True):
            # Half a step away at most, and the published division loses one step now and then.
            assert -1.501 <= time - index / length.fps * 10 <= 0.501 or time == int(length.duration * 10) - 1
    assert sorted(time for group in groups for time in group.times) == [
        time for group in groups for time in group.times
    ]


def test_times_are_tenths_of_a_second_inside_the_clip() -> None:
    assert packed(Length(8, 10.0), PACKED) == [Group((2,), (2,)), Group((6,), (6,))]
    # 0.05 s is as near to 0 as to 1; the last index is below the duration.
    assert packed(Length(4, 20.0), VideoOptions(fps=20.0).over(PACKED)) == [
        Group((0,), (0,)),
        Group((1,), (0,)),
        Group((2,), (1,)),
        Group((3,), (1,)),
    ]


def test_the_processor_of_transformers_chooses_the_same() -> None:
    theirs, draw = MiniCPMV4_6VideoProcessor(), random.Random(0)
    for _ in range(300):
        frames, fps = draw.randint(1, 9000), draw.choice([0.5, 1.0, 10.0, 23.976, 25.0, 29.97, 30.0, 60.0])
        length = Length(frames, fps)
        most = draw.choice([1, 2, 16, 128])
        metadata = VideoMetadata(total_num_frames=frames, fps=fps, duration=length.duration)
        wanted = [min(index, frames - 1) for index in theirs.sample_frames(metadata, max_num_frames=most)]
        assert indices(processor_sampling(length, VideoOptions(max_frames=most))) == wanted


def test_values_that_mean_nothing() -> None:
    with pytest.raises(ArgumentError, match="packing is 0; it must be a number above 0"):
        VideoOptions(packing=0)
