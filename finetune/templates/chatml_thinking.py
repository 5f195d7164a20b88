"""Prompt of the ChatML generations that think before they answer: MiniCPM-V 4.5 and later, MiniCPM-o 4.5."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.sample import DataError, Message, Sample, Text
from finetune.templates.chatml import add_prompt, add_results, begin, close_turn, numbered, open_answer, speech_of
from finetune.templates.rendering import Layout, Rendered, Vocabulary
from finetune.templates.turn_order import turns

ROLES = ("system", "user", "assistant", "tool")
_OPEN, _NO_THOUGHT = "<think>\n", "<think>\n\n</think>\n\n"
# At the start of the answer; the opening mark may be missing, because the prompt that asked for thinking wrote it.
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>|((?:(?!<think>).)*?)</think>", re.DOTALL)


def render(
    sample: Sample, plans: Sequence[SlicePlan | AudioPlan], vocabulary: Vocabulary, layout: Layout, generate: bool
) -> Rendered:
    """Role, content and end mark per turn; the last answer has a think block, empty where it has no thought.

    Of answers to earlier questions the thinking is left out. Answers between the last question and the last answer,
    which call tools, have a block where they have a thought, or by the layout always. Trained are answer and end mark,
    and a thought when the layout keeps it, with its marks; an empty block is a prompt; its end is trained where prompts
    ask for thinking.

    Args:
        sample: the conversation.
        plans: slice plan of every image, placeholders of every clip, in reading order.
        vocabulary: the tokenizer.
        layout: how the prompt is written.
        generate: end where the answer begins instead of after the answer.

    Raises:
        DataError: turns that the template cannot express, or a trained answer that is nothing but thinking.
    """
    rendered = Rendered()
    media = numbered(sample, plans)
    messages = turns(sample, ROLES, generate, trim=layout.trim, thinks=True)
    speech = [vocabulary.control(token) for token in speech_of(messages, layout)]
    begin(rendered, messages, vocabulary, layout)
    question = max((turn for turn, message in enumerate(messages) if _is_question(message)), default=len(messages) - 1)
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            thought, answer = _split(sample, turn, message)
            open_answer(rendered, vocabulary)
            if turn > question and thought and layout.thinking != "strip":
                _think(rendered, thought, vocabulary, train=message.train and layout.thinking == "keep")
                answer = answer.lstrip("\n")
            elif turn > question and (layout.thinks_between or turn == len(messages) - 1):
                _think_nothing(rendered, vocabulary, layout, train=message.train)
                answer = answer.lstrip("\n")
            if turn == len(messages) - 1:
                rendered.add(speech)
            rendered.add(vocabulary.continuation(answer), train=message.train)
            close_turn(rendered, vocabulary, train=message.train)
        elif message.role == "tool":
            add_results(rendered, messages, turn, vocabulary)
        else:
            add_prompt(rendered, message, media, vocabulary, layout)
    if generate:
        _open_last(rendered, vocabulary, layout)
        rendered.add(speech)
    return rendered


def _open_last(rendered: Rendered, vocabulary: Vocabulary, layout: Layout) -> None:
    """Where the answer begins that the model is to give."""
    open_answer(rendered, vocabulary)
    if layout.enable_thinking is False:
        rendered.add(vocabulary.fixed(_NO_THOUGHT))
    elif layout.enable_thinking and layout.thinking_prefill:
        rendered.add(vocabulary.fixed(_OPEN))


def _is_question(message: Message) -> bool:
    """Whether it is a user turn that is more than the result of a tool."""
    if message.role != "user" or not message.parts:
        return message.role == "user"
    first, last = message.parts[0], message.parts[-1]
    opened = isinstance(first, Text) and first.text.startswith("<tool_response>")
    return not (opened and isinstance(last, Text) and last.text.endswith("</tool_response>"))


def _split(sample: Sample, turn: int, message: Message) -> tuple[str, str]:
    """The thought of an answer, empty where it has none, and the answer itself."""
    found = _THOUGHT.match(message.text)
    if message.thought.strip():
        if found is not None:
            raise DataError(
                f"{sample.source}: turn {turn} has thinking beside its text and in it, before </think>; keep one"
            )
        return message.thought.strip("\n"), message.text
    if found is None:
        if message.train and message.text.lstrip().startswith("<think>"):
            raise DataError(f"{sample.source}: turn {turn}: <think> is never closed; put </think> behind the thinking")
        return "", message.text
    thought = found.group(1) if found.group(1) is not None else found.group(2)
    answer = message.text[found.end() :].lstrip("\n")
    if message.train and not answer.strip():
        raise DataError(f"{sample.source}: turn {turn}: no answer behind </think>; fill it in or remove the record")
    return thought.strip("\n"), answer


def _think(rendered: Rendered, thought: str, vocabulary: Vocabulary, *, train: bool) -> None:
    # The opening is encoded on its own: a prompt may end with it.
    rendered.add(vocabulary.fixed(_OPEN), train=train)
    rendered.add(vocabulary.continuation(f"{thought}\n</think>\n\n"), train=train)


def _think_nothing(rendered: Rendered, vocabulary: Vocabulary, layout: Layout, *, train: bool) -> None:
    """An empty think block: a prompt; where the prompt asks for thinking, the model is to close it at once."""
    if layout.enable_thinking and layout.thinking_prefill:
        rendered.add(vocabulary.fixed(_OPEN))
        rendered.add(vocabulary.continuation(_NO_THOUGHT.removeprefix(_OPEN)), train=train)
    else:
        rendered.add(vocabulary.fixed(_NO_THOUGHT))
