"""ChatML prompt template with thinking: MiniCPM-V 4.5 and later, MiniCPM-o 4.5, MiniCPM-OCR."""

from __future__ import annotations

import re
from collections.abc import Sequence

from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.sample import DataError, Message, Sample, Text
from finetune.templates.chatml import add_prompt, add_results, begin, close_turn, numbered, open_answer, speech_of
from finetune.templates.prompt_types import PromptLayout, PromptTokenizer, TokenizedPrompt
from finetune.templates.turn_order import turns

ROLES = ("system", "user", "assistant", "tool")
_OPEN, _NO_THOUGHT = "<think>\n", "<think>\n\n</think>\n\n"
# At the start of the answer; <think> may be missing, since a generation prompt may end with it.
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>|((?:(?!<think>).)*?)</think>", re.DOTALL)


def render(
    sample: Sample,
    plans: Sequence[SlicePlan | AudioPlan],
    tokenizer: PromptTokenizer,
    layout: PromptLayout,
    generate: bool,
) -> TokenizedPrompt:
    """Role, content and <|im_end|> per turn; the last answer has a think block, empty if it has no thinking.

    The thinking of answers before the last user question is dropped. Answers after it that call tools have a think
    block if they have thinking, or always (``thinks_between``). Labels are the answer and <|im_end|>, and with
    ``thinking`` "keep" the think block. An empty think block has no label, except </think> after a prompt that ends
    with <think>.

    Args:
        sample: the conversation.
        plans: slice plan of every image, placeholders of every audio clip, in reading order.
        tokenizer: as the templates see it (``PromptTokenizer``).
        layout: prompt layout.
        generate: end with the generation prompt instead of the answer.

    Raises:
        DataError: turns that the template does not support, or a trained answer that is only thinking.
    """
    rendered = TokenizedPrompt()
    media = numbered(sample, plans)
    messages = turns(sample, ROLES, generate, trim=layout.trim, thinks=True)
    speech = [tokenizer.control(token) for token in speech_of(messages, layout)]
    begin(rendered, messages, tokenizer, layout)
    question = max((turn for turn, message in enumerate(messages) if _is_question(message)), default=len(messages) - 1)
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            thought, answer = _split(sample, turn, message)
            last = turn == len(messages) - 1
            open_answer(rendered, tokenizer)
            if turn > question and _add_thought(rendered, thought, message, tokenizer, layout, last=last):
                answer = answer.lstrip("\n")
            rendered.add(speech if last else ())
            rendered.add(tokenizer.continuation(answer), train=message.train)
            close_turn(rendered, tokenizer, train=message.train)
        elif message.role == "tool":
            add_results(rendered, messages, turn, tokenizer)
        else:
            add_prompt(rendered, message, media, tokenizer, layout)
    if generate:
        _open_last(rendered, tokenizer, layout)
        rendered.add(speech)
    return rendered


def _open_last(rendered: TokenizedPrompt, tokenizer: PromptTokenizer, layout: PromptLayout) -> None:
    """Adds the generation prompt."""
    open_answer(rendered, tokenizer)
    if layout.enable_thinking is False:
        rendered.add(tokenizer.fixed(_NO_THOUGHT))
    elif layout.enable_thinking and layout.thinking_prefill:
        rendered.add(tokenizer.fixed(_OPEN))


def _is_question(message: Message) -> bool:
    """Whether it is a user turn other than a tool response."""
    if message.role != "user" or not message.parts:
        return message.role == "user"
    first, last = message.parts[0], message.parts[-1]
    opened = isinstance(first, Text) and first.text.startswith("<tool_response>")
    return not (opened and isinstance(last, Text) and last.text.endswith("</tool_response>"))


def _split(sample: Sample, turn: int, message: Message) -> tuple[str, str]:
    """The thinking of an answer, empty if it has none, and the answer itself."""
    found = _THOUGHT.match(message.text)
    if message.thought.strip():
        if found is not None:
            raise DataError(f"turn {turn} has thinking under a key and in its text, before </think>; keep one")
        return message.thought.strip("\n"), message.text
    if found is None:
        if message.train and message.text.lstrip().startswith("<think>"):
            raise DataError(f"turn {turn}: <think> is not closed; add </think> after the thinking")
        return "", message.text
    thought = found.group(1) if found.group(1) is not None else found.group(2)
    answer = message.text[found.end() :].lstrip("\n")
    if message.train and not answer.strip():
        raise DataError(f"turn {turn}: no answer after </think>; add it or remove the record")
    return thought.strip("\n"), answer


def _add_thought(
    rendered: TokenizedPrompt,
    thought: str,
    message: Message,
    tokenizer: PromptTokenizer,
    layout: PromptLayout,
    *,
    last: bool,
) -> bool:
    """Adds the think block of an answer after the last question; returns whether the answer has one."""
    if thought and layout.thinking != "strip":
        _think(rendered, thought, tokenizer, train=message.train and layout.thinking == "keep")
    elif layout.thinks_between or last:
        _think_nothing(rendered, tokenizer, layout, train=message.train)
    else:
        return False
    return True


def _think(rendered: TokenizedPrompt, thought: str, tokenizer: PromptTokenizer, *, train: bool) -> None:
    # <think> is tokenized on its own: a generation prompt may end with it.
    rendered.add(tokenizer.fixed(_OPEN), train=train)
    rendered.add(tokenizer.continuation(f"{thought}\n</think>\n\n"), train=train)


def _think_nothing(rendered: TokenizedPrompt, tokenizer: PromptTokenizer, layout: PromptLayout, *, train: bool) -> None:
    """Adds an empty think block without labels; after a prompt that ends with <think>, its rest is a label."""
    if layout.enable_thinking and layout.thinking_prefill:
        rendered.add(tokenizer.fixed(_OPEN))
        rendered.add(tokenizer.continuation(_NO_THOUGHT.removeprefix(_OPEN)), train=train)
    else:
        rendered.add(tokenizer.fixed(_NO_THOUGHT))
