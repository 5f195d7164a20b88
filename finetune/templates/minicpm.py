"""Prompt of MiniCPM-V 2.0."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.sample import Sample
from finetune.templates.placeholders import old_schema
from finetune.templates.rendering import Layout, Rendered, Vocabulary
from finetune.templates.turn_order import merged, turns

ROLES = ("user", "assistant")
_MARK = {"user": "<用户>", "assistant": "<AI>"}


def render(
    sample: Sample, plans: Sequence[SlicePlan | AudioPlan], vocabulary: Vocabulary, layout: Layout, generate: bool
) -> Rendered:
    """One text of turn marks and contents, cut only by images, as the published inference code encodes it.

    The turn marks are plain text, and the end token stands after the last answer alone: after an earlier answer the
    model sees the next user mark, while the label there is the end token, so that it learns to stop.

    Args:
        sample: the conversation.
        plans: slice plan of every image, in reading order; there is no sound.
        vocabulary: the tokenizer.
        layout: how the prompt is written.
        generate: end after the mark of the answer instead of after the answer.

    Raises:
        DataError: turns that the template cannot express.
    """
    rendered = Rendered()
    left = (plan for plan in plans if isinstance(plan, SlicePlan))
    end = vocabulary.control("</s>")
    rendered.add([vocabulary.control("<s>")])
    run = _Run(rendered, vocabulary, end)
    messages = turns(sample, ROLES, generate)
    for turn, message in enumerate(messages):
        run.add(_MARK[message.role])
        if message.role == "user":
            for part in merged(message.parts):
                if isinstance(part, str):
                    run.add(part)
                else:
                    run.flush()
                    rendered.add_items(*old_schema(next(left), layout, vocabulary))
        elif turn < len(messages) - 1:
            run.add(message.text, train=message.train)
        else:
            run.flush()
            # What the model writes after the prompt: it can see neither a word-start piece nor another <s> there.
            rendered.add([*vocabulary.continuation(message.text), end], train=message.train)
    if generate:
        run.add(_MARK["assistant"])
    run.flush()
    return rendered


class _Run:
    """Text between two images, encoded as one piece; the answers inside it keep their character ranges."""

    def __init__(self, rendered: Rendered, vocabulary: Vocabulary, end: int) -> None:
        self._rendered = rendered
        self._vocabulary = vocabulary
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
        ids, ranges = self._vocabulary.spans(self._text)
        start = len(self._rendered.input_ids)
        self._rendered.add(ids)
        for answer in self._answers:
            self._label(answer, ids, ranges, start)
        self._text, self._answers = "", []

    def _label(self, answer: tuple[int, int], ids: list[int], ranges: list[tuple[int, int]], start: int) -> None:
        """Labels an earlier answer and the token behind it.

        A token that spans the border of the answer has no loss: half of it is the prompt's. When it spans the end,
        no position is left where the model should stop, and the end token is not taught for this answer.
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
