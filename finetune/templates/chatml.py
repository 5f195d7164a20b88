"""Prompt of the ChatML generations that do not think: MiniCPM-V 2.6 and 4.0, MiniCPM-o 2.6."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.media.video_sampling import Frames
from finetune.sample import Media, Message, Sample, Text
from finetune.templates.placeholders import frame_schema, new_schema
from finetune.templates.rendering import Layout, Rendered, Vocabulary
from finetune.templates.turn_order import merged, turns

ROLES = ("system", "user", "assistant")


def render(
    sample: Sample, plans: Sequence[SlicePlan | AudioPlan], vocabulary: Vocabulary, layout: Layout, generate: bool
) -> Rendered:
    """Role, content as it is and end mark per turn; in front the bos token and the default system turn, if any.

    Every trained answer and its end mark are labels, nothing else: the line break behind the mark has no loss.

    Args:
        sample: the conversation.
        plans: slice plan of every image, placeholders of every clip, in reading order.
        vocabulary: the tokenizer.
        layout: how the prompt is written.
        generate: end after the header of the answer instead of after the answer.

    Raises:
        DataError: turns that the template cannot express.
    """
    rendered = Rendered()
    media = numbered(sample, plans)
    messages = turns(sample, (*ROLES, "tool") if layout.tools else ROLES, generate)
    speech = speech_of(messages, layout)
    begin(rendered, messages, vocabulary, layout)
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            open_answer(rendered, vocabulary, speech if turn == len(messages) - 1 else ())
            rendered.add(vocabulary.continuation(message.text), train=message.train)
            close_turn(rendered, vocabulary, train=message.train)
        elif message.role == "tool":
            add_results(rendered, messages, turn, vocabulary)
        else:
            add_prompt(rendered, message, media, vocabulary, layout)
    if generate:
        open_answer(rendered, vocabulary, speech)
    return rendered


def numbered(sample: Sample, plans: Sequence[SlicePlan | AudioPlan]) -> Iterator[tuple[int, SlicePlan | AudioPlan]]:
    """The media with their numbers; only images count."""
    images = 0
    for media, plan in zip(sample.media(), plans, strict=True):
        yield images, plan
        images += media.kind == "image"


def speech_of(messages: Sequence[Message], layout: Layout) -> tuple[str, ...]:
    """What stands behind the header of the last answer when the conversation is spoken, else nothing."""
    heard = any(isinstance(part, Media) and part.kind == "audio" for message in messages for part in message.parts)
    return layout.speech if layout.spoken == "always" or (heard and layout.spoken == "with audio") else ()


def begin(rendered: Rendered, messages: Sequence[Message], vocabulary: Vocabulary, layout: Layout) -> None:
    """What stands in front of the first turn: the bos token, and the default system turn where none is given."""
    if layout.bos:
        rendered.add([vocabulary.control(layout.bos)])
    if layout.default_system is not None and messages[0].role != "system" and not speech_of(messages, layout):
        add_prompt(rendered, Message("system", (Text(layout.default_system),)), iter(()), vocabulary, layout)


def add_prompt(
    rendered: Rendered,
    message: Message,
    media: Iterator[tuple[int, SlicePlan | AudioPlan]],
    vocabulary: Vocabulary,
    layout: Layout,
) -> None:
    """A system or user turn; ``media`` gives number and plan of the media that are left."""
    rendered.add([vocabulary.control("<|im_start|>")])
    # The role and the text behind it are one piece: their line breaks may be one token.
    text = f"{message.role}\n"
    for part in merged(message.parts):
        if isinstance(part, str):
            text += part
            continue
        rendered.add(vocabulary.text(text))
        number, plan = next(media)
        if isinstance(plan, AudioPlan):
            rendered.add_audio(plan, vocabulary)
        elif isinstance(part.data, Frames):
            rendered.add_items(*frame_schema(plan, part.data, layout, vocabulary))
        else:
            rendered.add_items(*new_schema(plan, number, layout, vocabulary))
        text = ""
    rendered.add(vocabulary.text(text))
    close_turn(rendered, vocabulary)


def add_results(rendered: Rendered, messages: Sequence[Message], turn: int, vocabulary: Vocabulary) -> None:
    """The tool turns from ``turn`` on as one user turn; nothing where they are in the middle of such a row."""
    if messages[turn - 1].role == "tool":
        return
    text = "user"
    for message in takewhile(lambda message: message.role == "tool", messages[turn:]):
        text += f"\n<tool_response>\n{message.text}\n</tool_response>"
    rendered.add([vocabulary.control("<|im_start|>"), *vocabulary.text(text)])
    close_turn(rendered, vocabulary)


def open_answer(rendered: Rendered, vocabulary: Vocabulary, speech: Sequence[str] = ()) -> None:
    """The header of an answer; encoded on its own, because the answer is generated behind it."""
    rendered.add([vocabulary.control("<|im_start|>"), *vocabulary.fixed("assistant\n")])
    rendered.add([vocabulary.control(token) for token in speech])


def close_turn(rendered: Rendered, vocabulary: Vocabulary, *, train: bool = False) -> None:
    """The end mark, a label when ``train``, and the line break, never one."""
    rendered.add([vocabulary.control("<|im_end|>")], train=train)
    rendered.add(vocabulary.fixed("\n"))
