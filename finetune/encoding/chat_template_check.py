"""Compares our prompts with the checkpoint's own ``chat_template``, and reads prompt settings from it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jinja2

from finetune.families.family import Family
from finetune.sample import Message, Sample, Source, Text
from finetune.templates.prompt_types import PromptLayout
from finetune.templates.tokenizer_view import TokenizerView
from finetune.utils.errors import UserError
from finetune.utils.log_once import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Chinese and digits too: a tokenizer with missing merges may still encode English correctly.
_TURNS = (
    ("user", "First question? 第一个问题：图片里有 12345 个苹果吗？"),
    ("assistant", "First answer. 图片中总共有 67 个苹果。"),
    ("user", "Second question? 在 2026 年呢？"),
)
# Prefix of the first user turn in ChatML: empty, or a system turn.
SYSTEM_TURN = re.compile(r"(?:<\|im_start\|>system\n(?P<system>.*)<\|im_end\|>\n)?", re.DOTALL)
FIRST_TURN = "<|im_start|>user\n"
TEMPLATE_FAULTS = (jinja2.TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError)
"""Exceptions that rendering a chat template may raise."""


class TemplateMismatchError(UserError):
    """The checkpoint's chat template and ours give different prompts."""


def complete_layout(family: Family, layout: PromptLayout, tokenizer: PreTrainedTokenizerBase) -> PromptLayout:
    """The layout with the fields listed in ``assumed`` read from the checkpoint's own files.

    The chat template gives the default system turn, bos, trimming and thinking; the tokenizer gives bos. A field that
    neither gives keeps the family's value, stays listed in ``assumed``, and is logged once.

    Raises:
        TemplateMismatchError: the chat template writes a prefix that this family's prompt does not support.
    """
    unknown = set(layout.assumed)
    if not unknown:
        return layout
    head = _head(family, tokenizer)
    if "bos" in unknown:
        adds = tokenizer("a")["input_ids"][:1] == [tokenizer.convert_tokens_to_ids(layout.bos)]
        writes = head is not None and head.startswith(layout.bos)
        if adds or head is not None:
            unknown.remove("bos")
            head = head.removeprefix(layout.bos) if head else head
            layout = replace(layout, bos=layout.bos if adds or writes else "")
    if head is not None and "default_system" in unknown:
        found = SYSTEM_TURN.fullmatch(head)
        if found is None:
            raise TemplateMismatchError(
                f"the chat template of {tokenizer.name_or_path!r} begins with {head!r}, the prompt of {family.title} "
                f"with a system turn or none; restore the published chat_template of {family.hub_id}"
            )
        unknown.remove("default_system")
        layout = replace(layout, default_system=found["system"])
    if "enable_thinking" in unknown and tokenizer.chat_template:
        unknown.remove("enable_thinking")
        layout = replace(layout, enable_thinking=_thinks(family, tokenizer))
    if "trim" in unknown and tokenizer.chat_template:
        unknown.remove("trim")
        spaced = " " + _TURNS[0][1]
        layout = replace(layout, trim=spaced not in _apply(family, tokenizer, (("user", spaced),), layout))
    for name in sorted(unknown):
        warn_once(
            logger,
            f"{tokenizer.name_or_path!r} has no chat template: {family.title} uses {name} {getattr(layout, name)!r}; "
            "add the published chat_template to its tokenizer files if that is wrong",
        )
    return replace(layout, assumed=tuple(sorted(unknown)))


def check_chat_template(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    layout: PromptLayout | None = None,
    prompt_tokenizer: TokenizerView | None = None,
) -> bool:
    """Renders a short conversation with the tokenizer's chat template and with ours, and compares the token ids.

    Args:
        family: model family.
        tokenizer: the checkpoint's tokenizer.
        layout: prompt layout, as in ``Encoder.layout``; None for the family's default.
        prompt_tokenizer: ``Encoder.prompt_tokenizer`` if there is one; building it from a full-size tokenizer takes
            about a second.

    Returns:
        Whether the tokenizer has a chat template.

    Raises:
        TemplateMismatchError: the ids differ; the message shows both prompts and the first difference.
    """
    if not tokenizer.chat_template:
        return False
    # The conversation has no image, so the image settings of config.json do not matter.
    layout = complete_layout(family, layout or family.layout({"query_num": 1}), tokenizer)
    theirs = _apply(family, tokenizer, _TURNS, layout)
    messages = tuple(Message(role, (Text(text),)) for role, text in _TURNS)
    if prompt_tokenizer is None:
        prompt_tokenizer = TokenizerView(tokenizer, family.control_tokens, family.required_tokens)
    probe = Sample(id="probe", source=Source("chat template probe", 0), messages=messages)
    our_ids = family.render(probe, (), prompt_tokenizer, layout, True).input_ids
    # The tokenizer may add the bos token instead of the template.
    text = theirs if theirs.startswith(layout.bos) else layout.bos + theirs
    if our_ids == tokenizer(text, add_special_tokens=False)["input_ids"]:
        return True
    ours = str(tokenizer.decode(our_ids, skip_special_tokens=False))
    raise TemplateMismatchError(
        f"the chat template of {tokenizer.name_or_path!r} does not write the prompt of {family.title}: "
        f"{_difference(ours, text)}.\n  template: {theirs!r}\n  ours:     {ours!r}\n"
        "A model trained with one prompt and used with the other gives bad answers. Restore the published "
        f"chat_template (tokenizer_config.json of {family.hub_id}); the official scripts replace it for training."
    )


def _apply(
    family: Family, tokenizer: PreTrainedTokenizerBase, turns: tuple[tuple[str, str], ...], layout: PromptLayout
) -> str:
    """The conversation rendered by the tokenizer's chat template, with the generation prompt."""
    conversation = [{"role": role, "content": text} for role, text in turns]
    options: dict[str, Any] = {} if layout.enable_thinking is None else {"enable_thinking": layout.enable_thinking}
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **options))
    except TEMPLATE_FAULTS as error:
        roles = ", ".join(role for role, _ in turns)
        raise TemplateMismatchError(
            f"the chat template of {tokenizer.name_or_path!r} cannot render {roles} ({type(error).__name__}: {error}); "
            f"restore the published tokenizer_config.json of {family.hub_id}"
        ) from error


def _head(family: Family, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text that the chat template writes before the first user turn; None without a template."""
    if not tokenizer.chat_template:
        return None
    written = _apply(family, tokenizer, _TURNS[:1], PromptLayout())
    before, turn, _ = written.partition(FIRST_TURN + _TURNS[0][1])
    # Without such a turn the whole prompts differ; ``check_chat_template`` reports the difference.
    return before if turn else ""


def _thinks(family: Family, tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """The template's default for ``enable_thinking``; None if its generation prompt has no think block."""
    opening = _apply(family, tokenizer, _TURNS[:1], PromptLayout(enable_thinking=None)).rpartition("assistant\n")[2]
    return "</think>" not in opening if "<think>" in opening else None


def _difference(ours: str, theirs: str) -> str:
    """A description of the differences between two prompts, by turn."""
    missing = [f"turn {turn} ({role})" for turn, (role, text) in enumerate(_TURNS) if text not in theirs]
    if missing:
        return f"{', '.join(missing)} does not appear in it"
    faults = []
    place = "before turn 0 (user)"
    for turn, (role, text) in enumerate(_TURNS):
        our_part, _, ours = ours.partition(text)
        their_part, _, theirs = theirs.partition(text)
        if our_part.strip(" ") != their_part.strip(" "):
            faults.append(f"{place} it has {their_part!r}, ours {our_part!r}")
        place = f"after turn {turn} ({role})"
    if ours.strip(" ") != theirs.strip(" "):
        faults.append(f"{place}, where the answer begins, it has {theirs!r}, ours {ours!r}")
    return "; ".join(faults) or "the same text gives different token ids"
