"""Videos of a conversation: looked at, planned, and spread out into the frames that stand in the prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from PIL import Image

from finetune.families.family import Config, Family, Video
from finetune.media import image, video
from finetune.media.audio_layout import Sound
from finetune.media.slicing import SlicePlan, SliceSpec, item_sizes, plan
from finetune.media.video_sampling import Clip, Frames, Group, VideoOptions, frames_of
from finetune.sample import Media, Message, Part, Sample, Source, Text
from finetune.utils.log_once import warn_once

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """The extent of a video: its chosen frames and their size.

    Attributes:
        clip: the video.
        groups: the frames that are looked at; a group shares its placeholders.
        size: (width, height) in pixels of a frame as it is cut.
    """

    clip: Clip
    groups: tuple[Group, ...]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """How a video takes its place: its frames, and how each of them is cut."""

    footage: VideoFrames
    cuts: SlicePlan


def video_options(family: Family, config: Config, given: VideoOptions | None) -> VideoOptions:
    """The options of a run over those of the checkpoint; what means nothing to the family is said once.

    Args:
        family: the generation.
        config: config.json of the checkpoint, as a dictionary.
        given: by the user; None for nothing.
    """
    given = given or VideoOptions()
    heeded = () if family.video is None else family.video.heeds
    if unheeded := [name for name in given.given if name not in heeded]:
        why = "has no such rule" if heeded else "takes none"
        warn_once(logger, f"videos: no effect of {', '.join(unheeded)}: {family.title} {why}")
    if (config.get("video_processor") or {}).get("stack_frames", 1) > 1:
        warn_once(
            logger,
            "videos: stack_frames of the checkpoint's video processor is not done: the model sees whole frames only",
        )
    return given if family.video is None else given.over(family.video.defaults(config))


def look(media: Media, source: Source, rule: Video, options: VideoOptions, max_pixels: int) -> VideoFrames:
    """The frames of a video that are looked at; none is decoded.

    Args:
        media: the video.
        source: named in errors.
        rule: how the family looks at videos.
        options: the same of this run, over those of the checkpoint.
        max_pixels: most pixels of a frame.

    Raises:
        DataError: it cannot be read.
    """
    clip = video.probe(media, source, options.fps or 1.0, max_pixels)
    return VideoFrames(clip, tuple(rule.sample(clip.length, options)), image.shrunk(clip.size, options.max_pixels))


def plan_footage(footage: VideoFrames, slicing: SliceSpec, options: VideoOptions) -> VideoPlan:
    """How the frames are cut: all alike, by the most slices of videos."""
    most = slicing.max_slice_nums if options.max_slice_nums is None else options.max_slice_nums
    # Frames are always enlarged: the published video processors have no other way.
    return VideoPlan(footage, plan(*footage.size, replace(slicing, max_slice_nums=most, enlarge="always")))


class Spread(NamedTuple):
    """A conversation as the prompt shows it.

    Attributes:
        sample: groups of frames stand in the place of videos, with the text that joins them.
        plans: one per medium of it.
    """

    sample: Sample
    plans: tuple[SlicePlan | Sound, ...]

    def visual(self) -> Iterator[tuple[Media, SlicePlan]]:
        """Images and groups of frames, in reading order."""
        for media, cuts in zip(self.sample.media(), self.plans, strict=True):
            if isinstance(cuts, SlicePlan):
                yield media, cuts


def spread(sample: Sample, plans: Sequence[SlicePlan | Sound | VideoPlan], between: str) -> Spread:
    """The conversation with frames in the place of videos.

    Args:
        sample: the conversation.
        plans: one per medium, in reading order.
        between: text that joins the groups of a video.
    """
    if not any(isinstance(each, VideoPlan) for each in plans):
        return Spread(sample, tuple(each for each in plans if not isinstance(each, VideoPlan)))
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
            frames = frames_of(planned.footage.clip, planned.footage.groups, videos)
            videos += 1
            for place, group in enumerate(frames):
                parts += [Text(between)] if place and between else []
                parts.append(Media("video", group))
            flat += [planned.cuts] * len(frames)
        messages.append(replace(message, parts=tuple(parts)))
    return Spread(replace(sample, messages=tuple(messages)), tuple(flat))


@dataclass(slots=True)
class FrameItems:
    """The n visual items of a conversation in the order of their patches, and the g groups that they make.

    Attributes:
        grids: rows and columns of patches per item.
        times: time index per item, -1 for stills.
        video: per item whether it comes from a video.
        groups: items per group; each group has a run of placeholders.
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


def items_of(shown: Spread, patch: int) -> FrameItems:
    """The visual items: of an image its thumbnail and slices, of a group the same of all its frames side by side."""
    items = FrameItems()
    for media, cuts in shown.visual():
        times = media.data.times if isinstance(media.data, Frames) else (-1,)
        for width, height in item_sizes(cuts):
            items.grids += [(height // patch, width // patch)] * len(times)
            items.times += times
            items.video += [media.kind == "video"] * len(times)
            items.groups.append(len(times))
    return items


class Shown(NamedTuple):
    """Decoded pictures that share their placeholders.

    Attributes:
        pictures: an image, or the frames of a group, in RGB.
        cuts: how each is cut.
        video: whether they are frames.
    """

    pictures: list[Image.Image]
    cuts: SlicePlan
    video: bool


def decoded(shown: Spread, load: Callable[[Media], Image.Image], most_pixels: int | None) -> Iterator[Shown]:
    """The pictures of a conversation; of every video one pass over its file.

    Args:
        shown: the conversation.
        load: decodes an image.
        most_pixels: larger frames are shrunk to about so many.

    Raises:
        DataError: one that cannot be decoded.
    """
    with ExitStack() as opened:
        decoder: video.Decoder | None = None
        for media, cuts in shown.visual():
            frames = media.data
            if not isinstance(frames, Frames):
                yield Shown([load(media)], cuts, False)
                continue
            if decoder is None or frames.opens:
                opened.close()
                decoder = opened.enter_context(video.Decoder(frames.clip, shown.sample.source))
            yield Shown([image.shrink(decoder.take(index), most_pixels) for index in frames.indices], cuts, True)
