"""What a template returns, and the tokenizer as a template sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

from finetune.media.audio_layout import AudioPlan

IGNORE = -100

Thinking = Literal["keep", "mask", "strip"]
Spoken = Literal["never", "with audio", "always"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a checkpoint's prompt is written, beyond the conversation itself.

    Attributes:
        query_num: placeholders per visual item, where every item has as many; else 0.
        pixels_per_token: pixels of an item per placeholder, where the number depends on the item's size; else 0.
        placeholder: token of which visual features take the place.
        video_placeholder: the same for the frames of videos, empty where it is the same token.
        image_ids: whether every image is preceded by its number in the conversation.
        video_ids: whether every video is preceded by its number.
        ids_beside_video: whether images keep their numbers in a conversation with videos.
        thinking: what happens to the thinking of trained answers: kept with loss, kept without loss, or taken out.
        enable_thinking: what the model is asked for when it answers; None writes neither form.
        thinking_prefill: whether a prompt that asks for thinking ends with the opening mark.
        bos: token in front of everything, empty for none.
        trim: whether turns lose the white space around them.
        tools: whether there are turns for the results of tools.
        thinks_between: whether every answer behind the last question has a think block, not the last one alone.
        default_system: text of the system turn of a conversation without one, None for no such turn.
        speech: control tokens behind the header of the last answer of a spoken conversation, which then has no default
            system turn.
        speech_end: control token behind the text of a spoken answer, where the model writes one.
        spoken: which conversations are spoken: none, those with sound, or all.
        assumed: names of fields that only the checkpoint's own files can tell; see ``probe.complete_layout``.
    """

    query_num: int = 0
    pixels_per_token: int = 0
    placeholder: str = "<unk>"
    video_placeholder: str = ""
    image_ids: bool = False
    video_ids: bool = False
    ids_beside_video: bool = False
    thinking: Thinking = "keep"
    enable_thinking: bool | None = False
    thinking_prefill: bool = True
    bos: str = ""
    trim: bool = False
    tools: bool = False
    thinks_between: bool = False
    default_system: str | None = None
    speech: tuple[str, ...] = ()
    speech_end: str = ""
    spoken: Spoken = "never"
    assumed: tuple[str, ...] = ()

    def item_tokens(self, width: int, height: int) -> int:
        """Placeholders of a visual item of so many pixels."""
        return self.query_num or width * height // self.pixels_per_token


class Vocabulary(Protocol):
    """Text to ids with the rule of the house: control tokens inside text are text, grounding marks are marks."""

    def control(self, token: str) -> int:
        """The id of a control token."""
        ...

    def text(self, text: str) -> list[int]:
        """Ids of a piece of text that starts the prompt or follows a control token (no bos, no eos)."""
        ...

    def fixed(self, text: str) -> list[int]:
        """As ``text``, remembered: for the words of the template itself."""
        ...

    def continuation(self, text: str) -> list[int]:
        """Ids of text that goes on where other text stopped: without the word-start piece of sentencepiece."""
        ...

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``text``, with the half-open character range of every id."""
        ...


class CachedVocabulary:
    """A vocabulary that spells each text once; what it gives must not be written into.

    Args:
        vocabulary: does the spelling.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.control, self.fixed = vocabulary.control, vocabulary.fixed
        self.text, self.continuation = cache(vocabulary.text), cache(vocabulary.continuation)
        self.spans = cache(vocabulary.spans)


@dataclass(slots=True)
class Rendered:
    """Ids and labels of one conversation, born together.

    Attributes:
        input_ids: token ids.
        labels: same length, unshifted, IGNORE where there is no loss.
        image_bounds: half-open token range of the placeholders of each visual item, in item order.
        audio_bounds: half-open token range of each run of placeholders of sound, in reading order.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image_bounds: list[tuple[int, int]] = field(default_factory=list)
    audio_bounds: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, train: bool = False) -> None:
        """Appends ids that are their own labels when ``train``, and carry no loss otherwise."""
        self.input_ids.extend(ids)
        self.labels.extend(ids if train else [IGNORE] * len(ids))

    def add_items(self, ids: Sequence[int], bounds: Sequence[tuple[int, int]]) -> None:
        """Appends the placeholders of an image; ``bounds`` count from the first of ``ids``."""
        start = len(self.input_ids)
        self.add(ids)
        self.image_bounds.extend((start + first, start + last) for first, last in bounds)

    def add_audio(self, sound: AudioPlan, vocabulary: Vocabulary) -> None:
        """Appends the placeholders of a clip, every run between its marks."""
        opening, unknown, closing = (
            vocabulary.control(token) for token in ("<|audio_start|>", "<unk>", "<|audio_end|>")
        )
        for count in sound.runs:
            start = len(self.input_ids) + 1
            self.add([opening, *[unknown] * count, closing])
            self.audio_bounds.append((start, start + count))
