"""Prompt of MiniCPM-V 4.6 and later: the ChatML of Qwen3.5, images with as many placeholders as their size asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune.media.slicing import Plan, item_sizes
from finetune.sample import Message, Sample
from finetune.templates.placeholders import Block
from finetune.templates.rendering import Layout, Rendered, Vocabulary
from finetune.templates.turns import merged, turns

ROLES = ("system", "user", "assistant")
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
_NO_THOUGHT = "<think>\n\n</think>\n\n"


def render(sample: Sample, plans: Sequence[Plan], vocabulary: Vocabulary, layout: Layout, generate: bool) -> Rendered:
    """Role, trimmed content and end mark per turn, as the published chat template writes them.

    Only the last answer has a place for thinking, empty where it has none; of earlier ones the thinking is left out.
    Every trained answer and its end mark are labels; a line break follows the mark, without loss.

    Args:
        sample: the conversation.
        plans: slice plan of every image, in reading order.
        vocabulary: the tokenizer.
        layout: how the prompt is written.
        generate: end where the answer begins instead of after the answer.

    Raises:
        DataError: turns that the template cannot express.
    """
    rendered = Rendered()
    start, end = vocabulary.control("<|im_start|>"), vocabulary.control("<|im_end|>")
    images = enumerate(plans)
    messages = turns(sample, ROLES, generate)
    for turn, message in enumerate(messages):
        rendered.add([start])
        if message.role == "assistant":
            _answer(rendered, message, vocabulary, layout, last=turn == len(messages) - 1)
        else:
            rendered.add(vocabulary.fixed(f"{message.role}\n"))
            _content(rendered, message, images, vocabulary, layout)
        rendered.add([end], train=message.train)
        rendered.add(vocabulary.fixed("\n"))
    if generate:
        opening = {None: "", True: "<think>\n", False: _NO_THOUGHT}[layout.enable_thinking]
        rendered.add([start, *vocabulary.fixed(f"assistant\n{opening}")])
    return rendered


def sized_schema(plan: Plan, number: int, layout: Layout, vocabulary: Vocabulary) -> Block:
    """Placeholders of one image: its number, the thumbnail, then the rows of slices, separated by a newline."""
    block = Block([], [])
    pad = vocabulary.control(IMAGE_PAD)
    if layout.image_ids:
        opening, closing = vocabulary.control("<image_id>"), vocabulary.control("</image_id>")
        block.ids.extend((opening, *vocabulary.fixed(str(number)), closing))

    def item(kind: str, size: tuple[int, int]) -> None:
        block.ids.append(vocabulary.control(f"<{kind}>"))
        block.bounds.append((len(block.ids), len(block.ids) + layout.item_tokens(*size)))
        block.ids.extend([pad] * layout.item_tokens(*size))
        block.ids.append(vocabulary.control(f"</{kind}>"))

    thumbnail, *slices = item_sizes(plan)
    item("image", thumbnail)
    columns = plan.grid[0] if plan.grid else 1
    for index, size in enumerate(slices):
        if index and index % columns == 0:
            block.ids.extend(vocabulary.fixed("\n"))
        item("slice", size)
    return block


def _content(
    rendered: Rendered, message: Message, images: Iterator[tuple[int, Plan]], vocabulary: Vocabulary, layout: Layout
) -> None:
    parts = merged(message.parts)
    for index, part in enumerate(parts):
        if isinstance(part, str):
            text = part.lstrip() if index == 0 else part
            rendered.add(vocabulary.text(text.rstrip() if index == len(parts) - 1 else text))
        else:
            number, plan = next(images)
            rendered.add_items(*sized_schema(plan, number, layout, vocabulary))


def _answer(rendered: Rendered, message: Message, vocabulary: Vocabulary, layout: Layout, *, last: bool) -> None:
    thought, answer = _split(message.text)
    if not last:
        rendered.add(vocabulary.fixed("assistant\n"))
    elif thought and layout.thinking != "strip":
        rendered.add(vocabulary.fixed("assistant\n<think>\n"))
        train = message.train and layout.thinking == "keep"
        # In one piece: a full stop and the line break behind it may be one token.
        rendered.add(vocabulary.text(f"{thought}\n</think>\n\n"), train=train)
    else:
        rendered.add(vocabulary.fixed(f"assistant\n{_NO_THOUGHT}"))
    rendered.add(vocabulary.text(answer), train=message.train)


def _split(text: str) -> tuple[str, str]:
    """The thinking of an answer, empty where it has none, and the answer itself."""
    before, mark, _ = text.strip().partition("</think>")
    if not mark:
        return "", text.strip()
    return before.split("<think>")[-1].strip(), text.rsplit("</think>", 1)[-1].strip()
