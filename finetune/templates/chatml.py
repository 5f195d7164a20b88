"""ChatML prompt template without thinking (MiniCPM-V 2.6 and 4.0, MiniCPM-o 2.6), and turns shared with thinking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.media.video_sampling import Frames
from finetune.sample import Media, Message, Sample, Text
from finetune.templates.placeholders import frame_schema, new_schema
from finetune.templates.prompt_types import PromptLayout, PromptTokenizer, TokenizedPrompt
from finetune.templates.turn_order import merged, turns

ROLES = ("system", "user", "assistant")


def render(
    sample: Sample,
    plans: Sequence[SlicePlan | AudioPlan],
    tokenizer: PromptTokenizer,
    layout: PromptLayout,
    generate: bool,
) -> TokenizedPrompt:
    """Role, unmodified content and <|im_end|> per turn, after the bos token and the default system turn, if any.

    Labels are every trained answer and its <|im_end|>; the newline after <|im_end|> has no label.

    Args:
        sample: the conversation.
        plans: slice plan of every image, placeholders of every audio clip, in reading order.
        tokenizer: as the templates see it (``PromptTokenizer``).
        layout: prompt layout.
        generate: end with the generation prompt instead of the answer.

    Raises:
        DataError: turns that the template does not support.
    """
    rendered = TokenizedPrompt()
    media = numbered(sample, plans)
    messages = turns(sample, (*ROLES, "tool") if layout.tools else ROLES, generate)
    speech = speech_of(messages, layout)
    begin(rendered, messages, tokenizer, layout)
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            open_answer(rendered, tokenizer, speech if turn == len(messages) - 1 else ())
            rendered.add(tokenizer.continuation(message.text), train=message.train)
            close_turn(rendered, tokenizer, train=message.train)
        elif message.role == "tool":
            add_results(rendered, messages, turn, tokenizer)
        else:
            add_prompt(rendered, message, media, tokenizer, layout)
    if generate:
        open_answer(rendered, tokenizer, speech)
    return rendered


def numbered(sample: Sample, plans: Sequence[SlicePlan | AudioPlan]) -> Iterator[tuple[int, SlicePlan | AudioPlan]]:
    """The plans of the media with the number of their image; videos and audio are not numbered here."""
    images = 0
    for media, plan in zip(sample.media(), plans, strict=True):
        yield images, plan
        images += media.kind == "image"


def speech_of(messages: Sequence[Message], layout: PromptLayout) -> tuple[str, ...]:
    """The speech tokens after the header of the last answer; none unless the answer is spoken."""
    has_audio = any(isinstance(part, Media) and part.kind == "audio" for message in messages for part in message.parts)
    return layout.speech if layout.spoken == "always" or (has_audio and layout.spoken == "with audio") else ()


def begin(
    rendered: TokenizedPrompt, messages: Sequence[Message], tokenizer: PromptTokenizer, layout: PromptLayout
) -> None:
    """Adds the bos token, and the default system turn if the conversation has none."""
    if layout.bos:
        rendered.add([tokenizer.control(layout.bos)])
    if layout.default_system is not None and messages[0].role != "system" and not speech_of(messages, layout):
        add_prompt(rendered, Message("system", (Text(layout.default_system),)), iter(()), tokenizer, layout)


def add_prompt(
    rendered: TokenizedPrompt,
    message: Message,
    media: Iterator[tuple[int, SlicePlan | AudioPlan]],
    tokenizer: PromptTokenizer,
    layout: PromptLayout,
) -> None:
    """Adds a system or user turn; ``media`` yields number and plan of the remaining media."""
    rendered.add([tokenizer.control("<|im_start|>")])
    # Role and text are tokenized together: their newlines may merge into one token.
    text = f"{message.role}\n"
    for part in merged(message.parts):
        if isinstance(part, str):
            text += part
            continue
        rendered.add(tokenizer.text(text))
        number, plan = next(media)
        if isinstance(plan, AudioPlan):
            rendered.add_audio(plan, tokenizer)
        elif isinstance(part.data, Frames):
            rendered.add_items(*frame_schema(plan, part.data, layout, tokenizer))
        else:
            rendered.add_items(*new_schema(plan, number, layout, tokenizer))
        text = ""
    rendered.add(tokenizer.text(text))
    close_turn(rendered, tokenizer)


def add_results(rendered: TokenizedPrompt, messages: Sequence[Message], turn: int, tokenizer: PromptTokenizer) -> None:
    """Adds consecutive tool turns from ``turn`` on as one user turn; nothing if ``turn`` is not the first of them."""
    if messages[turn - 1].role == "tool":
        return
    text = "user"
    for message in takewhile(lambda message: message.role == "tool", messages[turn:]):
        text += f"\n<tool_response>\n{message.text}\n</tool_response>"
    rendered.add([tokenizer.control("<|im_start|>"), *tokenizer.text(text)])
    close_turn(rendered, tokenizer)


def open_answer(rendered: TokenizedPrompt, tokenizer: PromptTokenizer, speech: Sequence[str] = ()) -> None:
    """Adds the header of an answer; tokenized on its own, as in a generation prompt."""
    rendered.add([tokenizer.control("<|im_start|>"), *tokenizer.fixed("assistant\n")])
    rendered.add([tokenizer.control(token) for token in speech])


def close_turn(rendered: TokenizedPrompt, tokenizer: PromptTokenizer, *, train: bool = False) -> None:
    """Adds <|im_end|>, a label when ``train``, and a newline, never a label."""
    rendered.add([tokenizer.control("<|im_end|>")], train=train)
    rendered.add(tokenizer.fixed("\n"))
