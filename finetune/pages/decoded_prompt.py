"""The conversation as the model gets it: its tokens as text, what is trained, and media in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from finetune.encoding.encoder import Encoder, MediaPlan
from finetune.encoding.length_policy import Fitted
from finetune.encoding.video_frames import ExpandedSample, expand_videos
from finetune.media import image
from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.media.video_sampling import Frames
from finetune.pages.html_page import count
from finetune.sample import Media, Sample
from finetune.templates.rendering import IGNORE, Rendered

_UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens that are shown together: one, or those that make a character or a medium.

    Attributes:
        text: what they stand for.
        ids: the tokens; of a medium none.
        trained: whether they carry loss.
        control: whether it is a token that steers the format.
        medium: number of the medium in the conversation, None for text.
        labels: what is to be predicted there, where that is not the tokens themselves.
    """

    text: str
    ids: tuple[int, ...] = ()
    trained: bool = False
    control: bool = False
    medium: int | None = None
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class MediaPlace:
    """Where a medium stands among the tokens.

    Attributes:
        first: position of its first token, the mark in front of its placeholders.
        last: position behind its last.
        words: what it is and what becomes of it.
    """

    first: int
    last: int
    words: str


def spread_out(encoder: Encoder, sample: Sample, plans: Sequence[MediaPlan]) -> ExpandedSample:
    """The conversation with the frames of its videos in their places."""
    return expand_videos(sample, plans, "" if encoder.family.video is None else encoder.family.video.separator)


def pieces(encoder: Encoder, fitted: Fitted) -> Iterator[PromptPart]:
    """The conversation of a sample from its first token to its last."""
    rendered, position = fitted.rendered, 0
    for number, place in enumerate(places(encoder, fitted)):
        yield from _texts(encoder, rendered, position, place.first)
        yield PromptPart(place.words, medium=number)
        position = place.last
    yield from _texts(encoder, rendered, position, len(rendered.input_ids))


def places(encoder: Encoder, fitted: Fitted) -> list[MediaPlace]:
    """The media of a sample among its tokens, in reading order; a video is one, with all its frames."""
    shown, rendered = spread_out(encoder, fitted.sample, fitted.plans), fitted.rendered
    whole = iter(fitted.sample.media())
    visual, heard = iter(rendered.image_bounds), iter(rendered.audio_bounds)
    found: list[tuple[Media, list[SlicePlan | AudioPlan], list[tuple[int, int]]]] = []
    for part, plan in zip(shown.sample.media(), shown.plans, strict=True):
        runs = len(plan.runs) if isinstance(plan, AudioPlan) else plan.items
        bounds = [next(heard if isinstance(plan, AudioPlan) else visual) for _ in range(runs)]
        if isinstance(part.data, Frames) and not part.data.opens:
            found[-1][1].append(plan)
            found[-1][2].extend(bounds)
        else:
            found.append((part, [plan], bounds))
            next(whole)
    videos = _frames(shown)
    return [_place(encoder, fitted.sample, videos, *each) for each in found]


def _frames(shown: ExpandedSample) -> dict[int, int]:
    """Frames that are looked at of every video, by its number."""
    counts: dict[int, int] = {}
    for part in shown.sample.media():
        if isinstance(part.data, Frames):
            counts[part.data.video] = counts.get(part.data.video, 0) + len(part.data.indices)
    return counts


def _place(
    encoder: Encoder,
    sample: Sample,
    videos: dict[int, int],
    part: Media,
    plans: list[SlicePlan | AudioPlan],
    bounds: list[tuple[int, int]],
) -> MediaPlace:
    tokens = count(sum(last - first for first, last in bounds), "token")
    plan = plans[0]
    if isinstance(plan, AudioPlan):
        assert encoder.audio_spec is not None  # or there would be no such plan
        words = f"sound {sum(plan.frames) * encoder.audio_spec.hop / encoder.audio_spec.rate:.1f} s: {tokens}"
    elif isinstance(part.data, Frames):
        clip = part.data.clip
        each = "" if plan.grid is None else f" of {_slices(plan)}"
        frames = count(videos[part.data.video], "frame")
        words = f"video {clip.size[0]}x{clip.size[1]}, {clip.length.duration:.1f} s: {frames}{each}, {tokens}"
    else:
        width, height = image.size(part, sample.source, encoder.max_pixels)
        small = image.shrunk((width, height), encoder.shrink_pixels)
        shrunk = "" if small == (width, height) else f" shrunk to {small[0]}x{small[1]}"
        words = f"image {width}x{height}{shrunk}: {_slices(plan)}, {tokens}"
    return MediaPlace(bounds[0][0] - 1, bounds[-1][1] + 1, f"[{words}]")


def _slices(plan: SlicePlan) -> str:
    return "1 slice" if plan.grid is None else f"1 + {count(plan.items - 1, 'slice')}"


def _texts(encoder: Encoder, rendered: Rendered, first: int, last: int) -> Iterator[PromptPart]:
    """The tokens of a range that holds no medium."""
    start = first
    for position in range(first, last):
        token = str(encoder.tokenizer.convert_ids_to_tokens(rendered.input_ids[position]))
        if encoder.vocabulary.has(token):
            yield from _run(encoder, rendered, start, position)
            yield replace(_piece(token, rendered, position, position + 1), control=True)
            start = position + 1
    yield from _run(encoder, rendered, start, last)


def _run(encoder: Encoder, rendered: Rendered, first: int, last: int) -> Iterator[PromptPart]:
    """Tokens of plain text; those that are only together a character, together.

    Each is read behind those in front of it, as some tokenizers write a word otherwise where a text begins.
    """
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    assert backend is not None  # the encoder's vocabulary is made from it
    decode = backend.decode
    ids, before, start = rendered.input_ids, first, first
    for position in range(first, last):
        known = decode(ids[before:start], skip_special_tokens=False)
        text = decode(ids[before : position + 1], skip_special_tokens=False)
        whole = len(text) > len(known) and not text.endswith(_UNFINISHED)
        if whole or position == last - 1:
            yield _piece(text[len(known) :], rendered, start, position + 1)
            before, start = start, position + 1


def _piece(text: str, rendered: Rendered, first: int, last: int) -> PromptPart:
    ids, labels = tuple(rendered.input_ids[first:last]), tuple(rendered.labels[first:last])
    trained = any(label != IGNORE for label in labels)
    return PromptPart(text, ids, trained, labels=labels if trained and labels != ids else ())
