"""The rendered prompt of a sample, token by token: decoded text, loss mask, and descriptions of its media."""

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
from finetune.templates.prompt_types import IGNORE, TokenizedPrompt

_UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens that are shown together: one, or those of one character or media item.

    Attributes:
        text: their decoded text.
        ids: the token ids; empty for a media item.
        trained: whether they carry loss.
        control: whether it is a control token of the chat template.
        medium: index of the media item in the conversation, None for text.
        labels: the labels, where they differ from the token ids.
        first: index of its first token in the sequence.
        tokens: number of its tokens; of a media item with its start and end tags.
    """

    text: str
    ids: tuple[int, ...] = ()
    trained: bool = False
    control: bool = False
    medium: int | None = None
    labels: tuple[int, ...] = ()
    first: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class MediaPlace:
    """Position of a media item in the token sequence.

    Attributes:
        first: index of its first token, the start tag before its placeholders.
        last: index after its last token.
        words: description of the item and its preprocessing.
    """

    first: int
    last: int
    words: str


def spread_out(encoder: Encoder, sample: Sample, plans: Sequence[MediaPlan]) -> ExpandedSample:
    """The conversation with its videos expanded to frames."""
    return expand_videos(sample, plans, "" if encoder.family.video is None else encoder.family.video.separator)


def prompt_parts(encoder: Encoder, fitted: Fitted, left_out: range = range(0)) -> Iterator[PromptPart]:
    """The prompt parts of a sample from its first token to its last, without those of ``left_out``.

    Args:
        encoder: of the sample.
        fitted: the sample.
        left_out: tokens that are not decoded, from 0 on; a media item is left out with its first token.
    """
    rendered, position = fitted.rendered, left_out.stop
    for number, place in _in_order(encoder, fitted):
        if place.last > position:
            yield from _texts(encoder, rendered, position, place.first)
            if place.first >= position:
                yield PromptPart(place.words, medium=number, first=place.first, tokens=place.last - place.first)
            position = place.last
    yield from _texts(encoder, rendered, position, len(rendered.input_ids))


def _in_order(encoder: Encoder, fitted: Fitted) -> list[tuple[int, MediaPlace]]:
    """The media with their numbers in the order of the prompt; the user audio of a full-duplex record once per unit."""
    found = list(enumerate(places(encoder, fitted)))
    if fitted.sample.timeline is None:
        return found
    track, _ = found.pop()
    plan = fitted.plans[track]
    assert isinstance(plan, AudioPlan)
    for unit, (first, last) in enumerate(fitted.rendered.audio_bounds[-len(plan.runs) :]):
        found.append((track, MediaPlace(first, last, f"[user audio {unit} to {unit + 1} s: {last - first} tokens]")))
    return sorted(found, key=lambda each: each[1].first)


def places(encoder: Encoder, fitted: Fitted) -> list[MediaPlace]:
    """Positions of the media of a sample, in reading order; a video with all its frames is one item."""
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
    placed = (_place(encoder, fitted.sample, videos, *each) for each in found)
    return [_with_grid_end(encoder, rendered, place) for place in placed]


def _with_grid_end(encoder: Encoder, rendered: TokenizedPrompt, place: MediaPlace) -> MediaPlace:
    """The place with the end tag of the grid that follows the last slice in MiniCPM-V 2.0 and 2.5."""
    behind = rendered.input_ids[place.last : place.last + 1]
    closes = [encoder.tokenizer.convert_ids_to_tokens(token) for token in behind] == ["</slice>"]
    return replace(place, last=place.last + 1) if closes else place


def _frames(shown: ExpandedSample) -> dict[int, int]:
    """Number of sampled frames of every video, by its index."""
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
        assert encoder.audio_spec is not None  # an audio plan exists only with an audio tower
        words = f"audio {sum(plan.frames) * encoder.audio_spec.hop / encoder.audio_spec.rate:.1f} s: {tokens}"
    elif isinstance(part.data, Frames):
        clip = part.data.clip
        each = "" if plan.grid is None else f" of {_slices(plan)}"
        frames = count(videos[part.data.video], "frame")
        words = f"video {clip.size[0]}x{clip.size[1]}, {clip.length.duration:.1f} s: {frames}{each}, {tokens}"
    else:
        width, height = image.size(part, encoder.refuse_above_pixels)
        small = image.shrunk((width, height), encoder.max_pixels)
        shrunk = "" if small == (width, height) else f" shrunk to {small[0]}x{small[1]}"
        words = f"image {width}x{height}{shrunk}: {_slices(plan)}, {tokens}"
    return MediaPlace(bounds[0][0] - 1, bounds[-1][1] + 1, f"[{words}]")


def _slices(plan: SlicePlan) -> str:
    return "1 slice" if plan.grid is None else f"1 + {count(plan.items - 1, 'slice')}"


def _texts(encoder: Encoder, rendered: TokenizedPrompt, first: int, last: int) -> Iterator[PromptPart]:
    """The tokens of a range without media."""
    start = first
    for position in range(first, last):
        token = str(encoder.tokenizer.convert_ids_to_tokens(rendered.input_ids[position]))
        if encoder.prompt_tokenizer.has(token):
            yield from _run(encoder, rendered, start, position)
            yield replace(_prompt_part(token, rendered, position, position + 1), control=True)
            start = position + 1
    yield from _run(encoder, rendered, start, last)


def _run(encoder: Encoder, rendered: TokenizedPrompt, first: int, last: int) -> Iterator[PromptPart]:
    """Tokens of plain text; tokens that form one character are joined.

    Each is decoded after its predecessors, as some tokenizers decode the first token of a text differently.
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
            yield _prompt_part(text[len(known) :], rendered, start, position + 1)
            before, start = start, position + 1


def _prompt_part(text: str, rendered: TokenizedPrompt, first: int, last: int) -> PromptPart:
    ids, labels = tuple(rendered.input_ids[first:last]), tuple(rendered.labels[first:last])
    trained = any(label != IGNORE for label in labels)
    own = labels if trained and labels != ids else ()
    return PromptPart(text, ids, trained, labels=own, first=first, tokens=last - first)
