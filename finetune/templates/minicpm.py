"""Prompt template of MiniCPM-V 2.0: <用户> and <AI> as plain text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.sample import Sample
from finetune.templates.placeholders import old_schema
from finetune.templates.prompt_types import PromptLayout, PromptTokenizer, TokenizedPrompt
from finetune.templates.turn_order import merged, turns

ROLES = ("user", "assistant")
_MARK = {"user": "<用户>", "assistant": "<AI>"}


def render(
    sample: Sample,
    plans: Sequence[SlicePlan | AudioPlan],
    tokenizer: PromptTokenizer,
    layout: PromptLayout,
    generate: bool,
) -> TokenizedPrompt:
    """Turn markers and contents as one text, split only at images and tokenized as in the published inference code.

    The turn markers are plain text, and </s> follows only the last answer. After an earlier answer the input is the
    next user marker and the label is </s>, so that the model learns to stop.

    Args:
        sample: the conversation.
        plans: slice plan of every image, in reading order; this family has no audio.
        tokenizer: as the templates see it (``PromptTokenizer``).
        layout: prompt layout.
        generate: end with the generation prompt instead of the answer.

    Raises:
        DataError: turns that the template does not support.
    """
    rendered = TokenizedPrompt()
    left = (plan for plan in plans if isinstance(plan, SlicePlan))
    end = tokenizer.control("</s>")
    rendered.add([tokenizer.control("<s>")])
    run = _Run(rendered, tokenizer, end)
    messages = turns(sample, ROLES, generate)
    for turn, message in enumerate(messages):
        run.add(_MARK[message.role])
        if message.role == "user":
            for part in merged(message.parts):
                if isinstance(part, str):
                    run.add(part)
                else:
                    run.flush()
                    rendered.add_items(*old_schema(next(left), layout, tokenizer))
        elif turn < len(messages) - 1:
            run.add(message.text, train=message.train)
        else:
            run.flush()
            # Tokenized as a continuation of the prompt: without the word-start token of sentencepiece and without <s>.
            rendered.add([*tokenizer.continuation(message.text), end], train=message.train)
    if generate:
        run.add(_MARK["assistant"])
    run.flush()
    return rendered


class _Run:
    """Text between two images, tokenized at once; the labels of answers follow from their character ranges."""

    def __init__(self, rendered: TokenizedPrompt, tokenizer: PromptTokenizer, end: int) -> None:
        self._rendered = rendered
        self._tokenizer = tokenizer
        self._end = end
        self._text = ""
        self._answers: list[tuple[int, int]] = []

    def add(self, text: str, *, train: bool = False) -> None:
        if train:
            self._answers.append((len(self._text), len(self._text) + len(text)))
        self._text += text

    def flush(self) -> None:
        if not self._text:
            return
        ids, ranges = self._tokenizer.spans(self._text)
        start = len(self._rendered.input_ids)
        self._rendered.add(ids)
        for answer in self._answers:
            self._label(answer, ids, ranges, start)
        self._text, self._answers = "", []

    def _label(self, answer: tuple[int, int], ids: list[int], ranges: list[tuple[int, int]], start: int) -> None:
        """Sets the labels of an earlier answer and of the token after it.

        A token across a boundary of the answer has no label, since part of it belongs to the prompt. If it crosses the
        end, no position is left for the end token, and this answer has none.
        """
        first, last = answer
        for index in range(bisect_left(ranges, first, key=lambda each: each[0]), len(ranges)):
            left, right = ranges[index]
            if first <= left and right <= last:
                self._rendered.labels[start + index] = ids[index]
            elif left >= last:
                if index == 0 or ranges[index - 1][1] <= last:
                    self._rendered.labels[start + index] = self._end
                break
