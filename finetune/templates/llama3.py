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
    tokenizer: PromptTokenizer,
    layout: PromptLayout,
    generate: bool,
) -> TokenizedPrompt:
    """Header, trimmed content and <|eot_id|> per turn, as in the published inference template.

    Labels are every trained answer and its <|eot_id|>.

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
    end = [tokenizer.control("<|eot_id|>")]
    rendered.add([tokenizer.control("<|begin_of_text|>")])
    for message in turns(sample, ROLES, generate):
        rendered.add(_header(message.role, tokenizer))
        parts = merged(message.parts)
        for index, part in enumerate(parts):
            if not isinstance(part, str):
                rendered.add_items(*old_schema(next(left), layout, tokenizer))
                continue
            text = part.lstrip() if index == 0 else part
            text = text.rstrip() if index == len(parts) - 1 else text
            rendered.add(tokenizer.text(text), train=message.train)
        rendered.add(end, train=message.train)
    if generate:
        rendered.add(_header("assistant", tokenizer))
    return rendered


def _header(role: str, tokenizer: PromptTokenizer) -> list[int]:
    start, end = tokenizer.control("<|start_header_id|>"), tokenizer.control("<|end_header_id|>")
    return [start, *tokenizer.fixed(role), end, *tokenizer.fixed("\n\n")]
