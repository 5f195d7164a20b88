"""Llama 3 prompt template: MiniCPM-Llama3-V 2.5."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.media.audio_layout import AudioPlan
from finetune.media.slicing import SlicePlan
from finetune.sample import Sample
from finetune.templates.placeholders import old_schema
from finetune.templates.prompt_types import PromptLayout, PromptTokenizer, TokenizedPrompt
from finetune.templates.turn_order import merged, turns

ROLES = ("system", "user", "assistant")


def render(
    sample: Sample,
    plans: Sequence[SlicePlan | AudioPlan],
    vocabulary: PromptTokenizer,
    layout: PromptLayout,
    generate: bool,
) -> TokenizedPrompt:
    """Header, trimmed content and <|eot_id|> per turn, as in the published inference template.

    Labels are every trained answer and its <|eot_id|>.

    Args:
        sample: the conversation.
        plans: slice plan of every image, in reading order; this family has no audio.
        vocabulary: the tokenizer.
        layout: prompt layout.
        generate: end with the generation prompt instead of the answer.

    Raises:
        DataError: turns that the template does not support.
    """
    rendered = TokenizedPrompt()
    left = (plan for plan in plans if isinstance(plan, SlicePlan))
    end = [vocabulary.control("<|eot_id|>")]
    rendered.add([vocabulary.control("<|begin_of_text|>")])
    for message in turns(sample, ROLES, generate):
        rendered.add(_header(message.role, vocabulary))
        parts = merged(message.parts)
        for index, part in enumerate(parts):
            if not isinstance(part, str):
                rendered.add_items(*old_schema(next(left), layout, vocabulary))
                continue
            text = part.lstrip() if index == 0 else part
            text = text.rstrip() if index == len(parts) - 1 else text
            rendered.add(vocabulary.text(text), train=message.train)
        rendered.add(end, train=message.train)
    if generate:
        rendered.add(_header("assistant", vocabulary))
    return rendered


def _header(role: str, vocabulary: PromptTokenizer) -> list[int]:
    start, end = vocabulary.control("<|start_header_id|>"), vocabulary.control("<|end_header_id|>")
    return [start, *vocabulary.fixed(role), end, *vocabulary.fixed("\n\n")]
