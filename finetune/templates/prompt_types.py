"""Types of prompt rendering: PromptLayout (settings), PromptTokenizer (interface), TokenizedPrompt (ids and labels)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

from finetune.media.audio_layout import AudioPlan

IGNORE = -100

Thinking = Literal["keep", "mask", "strip"]
Spoken = Literal["never", "with audio", "always"]
DuplexName = Literal["native", "o45_fc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLayout:
    """Prompt options of a checkpoint.

    Attributes:
        query_num: placeholders per visual item if all items have the same number; else 0.
        pixels_per_token: pixels of an item per placeholder if the number depends on the item's size; else 0.
        placeholder: token whose embeddings the image and audio features replace.
        video_placeholder: the same for video frames; empty if it is the same token.
        image_ids: whether every image is preceded by its number in the conversation.
        video_ids: whether every video is preceded by its number.
        ids_beside_video: whether images keep their numbers in a conversation with videos.
        thinking: thinking of trained answers: "keep" (with labels), "mask" (without labels) or "strip" (removed).
        enable_thinking: as in chat templates, for generation prompts; None adds no think block.
        thinking_prefill: whether a generation prompt with enable_thinking ends with <think>.
        bos: token before everything, empty for none.
        trim: whether white space around the content of turns is stripped.
        tools: whether tool turns are supported.
        thinks_between: whether every answer after the last user question has a think block, not only the last one.
        default_system: text of the system turn of a conversation without one; None for no such turn.
        speech: control tokens after the header of a spoken last answer; such a conversation has no default system turn.
        speech_end: control token that ends the text of a spoken answer; empty for none.
        spoken: which conversations have a spoken answer: "never", "with audio" (input), or "always".
        duplex: prompt of full-duplex records.
        assumed: fields to be read from the checkpoint's own files; see ``chat_template_check.complete_layout``.
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
    duplex: DuplexName = "native"
    assumed: tuple[str, ...] = ()

    def item_tokens(self, width: int, height: int) -> int:
        """Number of placeholders of a visual item of this size in pixels."""
        return self.query_num or width * height // self.pixels_per_token


class PromptTokenizer(Protocol):
    """The tokenizer interface of the templates: in text, grounding tags are tokens and control tokens are not."""

    def control(self, token: str) -> int:
        """The id of a control token."""
        ...

    def text(self, text: str) -> list[int]:
        """Ids of text at the start of the prompt or after a control token (no bos, no eos)."""
        ...

    def fixed(self, text: str) -> list[int]:
        """As ``text``, cached: for the constant strings of a template."""
        ...

    def continuation(self, text: str) -> list[int]:
        """Ids of text that continues other text: without the word-start token of sentencepiece."""
        ...

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``text``, with the half-open character range of every id."""
        ...


class CachedPromptTokenizer:
    """A ``PromptTokenizer`` that caches the ids of every text; do not modify the returned lists.

    Args:
        tokenizer: the one whose ids are cached.
    """

    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self.control, self.fixed = tokenizer.control, tokenizer.fixed
        self.text, self.continuation = cache(tokenizer.text), cache(tokenizer.continuation)
        self.spans = cache(tokenizer.spans)


@dataclass(slots=True)
class TokenizedPrompt:
    """Token ids and labels of one conversation, appended together.

    Attributes:
        input_ids: token ids.
        labels: same length, not shifted, IGNORE where there is no loss.
        image_bounds: half-open token range of the placeholders of each visual item, in item order.
        audio_bounds: half-open token range of each audio placeholder run, in reading order.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image_bounds: list[tuple[int, int]] = field(default_factory=list)
    audio_bounds: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, train: bool = False) -> None:
        """Appends ids, with themselves as labels when ``train``, else with IGNORE."""
        self.input_ids.extend(ids)
        self.labels.extend(ids if train else [IGNORE] * len(ids))

    def add_items(self, ids: Sequence[int], bounds: Sequence[tuple[int, int]]) -> None:
        """Appends the placeholders of an image; ``bounds`` are relative to the first of ``ids``."""
        start = len(self.input_ids)
        self.add(ids)
        self.image_bounds.extend((start + first, start + last) for first, last in bounds)

    def add_audio(self, plan: AudioPlan, tokenizer: PromptTokenizer) -> None:
        """Appends the placeholders of an audio clip, every run between <|audio_start|> and <|audio_end|>."""
        opening, unknown, closing = (
            tokenizer.control(token) for token in ("<|audio_start|>", "<unk>", "<|audio_end|>")
        )
        for count in plan.runs:
            self.add([opening])
            self.add_run(count, unknown)
            self.add([closing])

    def add_run(self, count: int, placeholder: int) -> None:
        """Appends one run of audio placeholders."""
        start = len(self.input_ids)
        self.add([placeholder] * count)
        self.audio_bounds.append((start, start + count))
