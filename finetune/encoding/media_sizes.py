"""Sizes of media before encoding, and the placeholders that follow from them: ``MediaSize``, ``MediaPlan``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from finetune.encoding.video_frames import VideoFrames, VideoPlan
from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.media.small_print import SmallPrint


class PictureSize(NamedTuple):
    """Size in pixels of a picture of a full-duplex record, which is not sliced."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class TrackLength:
    """Number of audio samples of the user audio of a full-duplex record, which has one placeholder run per second.

    Attributes:
        samples: number of samples.
        alone: whether every second is encoded alone.
    """

    samples: int
    alone: bool = False


MediaSize = tuple[int, int] | PictureSize | SmallPrint | int | TrackLength | VideoFrames
"""Size of a medium: (width, height) in pixels of an image, number of audio samples, sampled frames of a video.

Images are decoded (``SmallPrint``) where their pixels decide the slicing.
"""
MediaPlan = SlicePlan | AudioPlan | VideoPlan
"""Placeholders of a medium: slices of an image, tokens of an audio clip, frames of a video and their slices."""
