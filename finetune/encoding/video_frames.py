"""Videos in prompts: frame sampling, slicing plans, and the expansion of a video into frame placeholders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from PIL import Image

from finetune.families.family import Config, Family, Video
from finetune.media import image, video
from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan, SliceSpec, item_sizes, plan
from finetune.media.video_sampling import Clip, Frames, Group, VideoOptions, frames_of
from finetune.sample import Media, Message, Part, Sample, Text
from finetune.utils.log_once import warn_once

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """The sampled frames of a video and their size.

    Attributes:
        clip: the video.
        groups: the sampled frames; the frames of a group share placeholders.
        size: (width, height) in pixels of a frame before slicing.
    """

    clip: Clip
    groups: tuple[Group, ...]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """The sampled frames of a video, and the slice plan of each frame."""

    frames: VideoFrames
    cuts: SlicePlan


def video_options(family: Family, config: Config, given: VideoOptions | None) -> VideoOptions:
    """The user's video options, with defaults from the checkpoint; unsupported options are logged once.

    Args:
        family: model family.
        config: config.json of the checkpoint, as a dictionary.
        given: options set by the user; None for none.
    """
    given = given or VideoOptions()
    supported = () if family.video is None else family.video.options
    if ignored := [name for name in given.given if name not in supported]:
        why = "does not support it" if supported else "has no video input"
        warn_once(logger, f"videos: {', '.join(ignored)} has no effect: {family.title} {why}")
    if (config.get("video_processor") or {}).get("stack_frames", 1) > 1:
        warn_once(
            logger,
            "videos: stack_frames of the checkpoint's video processor is ignored: every frame is encoded on its own",
        )
    return given if family.video is None else given.over(family.video.defaults(config))


def probe_video(media: Media, rule: Video, options: VideoOptions, max_pixels: int) -> VideoFrames:
    """Samples the frames of a video by its header, without decoding them.

    Args:
        media: the video.
        rule: video sampling of the family.
        options: video options of the run.
        max_pixels: maximum number of pixels of a frame.

    Raises:
        DataError: it cannot be read.
    """
    clip = video.probe(media, options.fps or 1.0, max_pixels)
    return VideoFrames(clip, tuple(rule.sample(clip.length, options)), image.shrunk(clip.size, options.max_pixels))


def plan_video(frames: VideoFrames, slicing: SliceSpec, options: VideoOptions) -> VideoPlan:
    """The slice plan of the frames, the same for all, with the max_slice_nums of videos."""
    most = slicing.max_slice_nums if options.max_slice_nums is None else options.max_slice_nums
    # Frames are always upscaled, as in the published video processors.
    return VideoPlan(frames, plan(*frames.size, replace(slicing, max_slice_nums=most, enlarge="always")))


class ExpandedSample(NamedTuple):
    """A conversation whose videos are replaced by frames.

    Attributes:
        sample: the conversation, with frame groups and separator text in place of videos.
        plans: one per medium of it.
    """

    sample: Sample
    plans: tuple[SlicePlan | AudioPlan, ...]

    def visual(self) -> Iterator[tuple[Media, SlicePlan]]:
        """Images and groups of frames, in reading order."""
        for media, cuts in zip(self.sample.media(), self.plans, strict=True):
            if isinstance(cuts, SlicePlan):
                yield media, cuts


def expand_videos(sample: Sample, plans: Sequence[SlicePlan | AudioPlan | VideoPlan], separator: str) -> ExpandedSample:
    """The conversation with videos replaced by their frame groups.

    Args:
        sample: the conversation.
        plans: one per medium, in reading order.
        separator: text between two groups of a video.
    """
    if not any(isinstance(each, VideoPlan) for each in plans):
        return ExpandedSample(sample, tuple(each for each in plans if not isinstance(each, VideoPlan)))
    left, flat, videos = iter(plans), [], 0
    messages: list[Message] = []
    for message in sample.messages:
        parts: list[Part] = []
        for part in message.parts:
            planned = next(left) if isinstance(part, Media) else None
            if not isinstance(planned, VideoPlan):
                parts.append(part)
                flat += [] if planned is None else [planned]
                continue
            frames = frames_of(planned.frames.clip, planned.frames.groups, videos)
            videos += 1
            for place, group in enumerate(frames):
                parts += [Text(separator)] if place and separator else []
                parts.append(Media("video", group))
            flat += [planned.cuts] * len(frames)
        messages.append(replace(message, parts=tuple(parts)))
    return ExpandedSample(replace(sample, messages=tuple(messages)), tuple(flat))


@dataclass(slots=True)
class FrameItems:
    """The n visual items of a conversation in the order of their patches, and their g groups.

    Attributes:
        grids: rows and columns of patches per item.
        times: time index per item, -1 for stills.
        video: per item whether it comes from a video.
        groups: items per group; each group has one placeholder run.
    """

    grids: list[tuple[int, int]] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    video: list[bool] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def firsts(self) -> list[int]:
        """The number of the first item of every group."""
        starts, start = [], 0
        for count in self.groups:
            starts.append(start)
            start += count
        return starts


def items_of(expanded: ExpandedSample, patch: int) -> FrameItems:
    """The visual items: thumbnail and slices of every image, and of every frame of a group."""
    items = FrameItems()
    for media, cuts in expanded.visual():
        times = media.data.times if isinstance(media.data, Frames) else (-1,)
        for width, height in item_sizes(cuts):
            items.grids += [(height // patch, width // patch)] * len(times)
            items.times += times
            items.video += [media.kind == "video"] * len(times)
            items.groups.append(len(times))
    return items


class DecodedGroup(NamedTuple):
    """Decoded images that share placeholders.

    Attributes:
        images: an image, or the frames of a group, in RGB.
        cuts: slice plan of each.
        video: whether they are video frames.
    """

    images: list[Image.Image]
    cuts: SlicePlan
    video: bool


def decoded(
    expanded: ExpandedSample, load: Callable[[Media], Image.Image], max_pixels: int | None
) -> Iterator[DecodedGroup]:
    """Decodes the images and frames of a conversation; every video file is read once, front to back.

    Args:
        expanded: the conversation.
        load: decodes an image.
        max_pixels: larger frames are downscaled to at most this many pixels; None for never.

    Raises:
        DataError: a medium that cannot be decoded.
    """
    with ExitStack() as opened:
        decoder: video.Decoder | None = None
        for media, cuts in expanded.visual():
            frames = media.data
            if not isinstance(frames, Frames):
                yield DecodedGroup([load(media)], cuts, False)
                continue
            if decoder is None or frames.opens:
                opened.close()
                decoder = opened.enter_context(video.Decoder(frames.clip, _indices(expanded, frames.video)))
            images = [image.shrink(decoder.take(index), max_pixels) for index in frames.indices]
            yield DecodedGroup(images, cuts, True)


def _indices(expanded: ExpandedSample, number: int) -> list[int]:
    """All sampled frames of a video of the conversation, by its number."""
    groups = (media.data for media, _ in expanded.visual() if isinstance(media.data, Frames))
    return [index for group in groups if group.video == number for index in group.indices]
