"""Prompt of the ChatML generations that do not think: MiniCPM-V 2.6 and 4.0, MiniCPM-o 2.6."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune.media.slicing import Plan
from finetune.sample import Message, Sample, Text
from finetune.templates.placeholders import new_schema
from finetune.templates.rendering import Layout, Rendered, Vocabulary
from finetune.templates.turns import merged, turns

ROLES = ("system", "user", "assistant")


def render(sample: Sample, plans: Sequence[Plan], vocabulary: Vocabulary, layout: Layout, generate: bool) -> Rendered:
    """Role, content as it is and end mark per turn; in front the bos token and the default system turn, if any.

    Every trained answer and its end mark are labels, nothing else: the line break behind the mark has no loss.

    Args:
        sample: the conversation.
        plans: slice plan of every image, in reading order.
        vocabulary: the tokenizer.
        layout: how the prompt is written.
        generate: end after the header of the answer instead of after the answer.

    Raises:
        DataError: turns that the template cannot express.
    """
    rendered = Rendered()
    images = enumerate(plans)
    messages = turns(sample, ROLES, generate)
    begin(rendered, messages, vocabulary, layout)
    for message in messages:
        if message.role == "assistant":
            open_answer(rendered, vocabulary)
            rendered.add(vocabulary.continuation(message.text), train=message.train)
            close_turn(rendered, vocabulary, train=message.train)
        else:
            add_prompt(rendered, message, images, vocabulary, layout)
    if generate:
        open_answer(rendered, vocabulary)
    return rendered


def begin(rendered: Rendered, messages: Sequence[Message], vocabulary: Vocabulary, layout: Layout) -> None:
    """What stands in front of the first turn: the bos token, and the default system turn where none is given."""
    if layout.bos:
        rendered.add([vocabulary.control(layout.bos)])
    if layout.default_system is not None and messages[0].role != "system":
        add_prompt(rendered, Message("system", (Text(layout.default_system),)), enumerate(()), vocabulary, layout)


def add_prompt(
    rendered: Rendered, message: Message, images: Iterator[tuple[int, Plan]], vocabulary: Vocabulary, layout: Layout
) -> None:
    """A system or user turn; ``images`` gives number and plan of the images that are left."""
    rendered.add([vocabulary.control("<|im_start|>")])
    # The role and the text behind it are one piece: their line breaks may be one token.
    text = f"{message.role}\n"
    for part in merged(message.parts):
        if isinstance(part, str):
            text += part
            continue
        rendered.add(vocabulary.text(text))
        number, plan = next(images)
        rendered.add_items(*new_schema(plan, number, layout, vocabulary))
        text = ""
    rendered.add(vocabulary.text(text))
    close_turn(rendered, vocabulary)


def open_answer(rendered: Rendered, vocabulary: Vocabulary) -> None:
    """The header of an answer; encoded on its own, because the answer is generated behind it."""
    rendered.add([vocabulary.control("<|im_start|>"), *vocabulary.fixed("assistant\n")])


def close_turn(rendered: Rendered, vocabulary: Vocabulary, *, train: bool = False) -> None:
    """The end mark, a label when ``train``, and the line break, never one."""
    rendered.add([vocabulary.control("<|im_end|>")], train=train)
    rendered.add(vocabulary.fixed("\n"))
