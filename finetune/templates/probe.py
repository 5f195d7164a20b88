"""Is the prompt we write the one that the checkpoint's own chat template writes?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jinja2

from finetune.errors import UserError
from finetune.families.base import Family
from finetune.sample import Message, Sample, Source, Text
from finetune.templates.rendering import Layout
from finetune.templates.tokens import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS = (("user", "First question?"), ("assistant", "First answer."), ("user", "Second question?"))


class TemplateMismatchError(UserError):
    """The checkpoint's chat template and ours give different prompts."""


def check_chat_template(family: Family, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Renders a short conversation by the tokenizer's chat template and by ours, and compares the ids.

    Returns:
        Whether there was a template to compare with.

    Raises:
        TemplateMismatchError: the ids differ; the message shows both prompts and where they part.
    """
    if not tokenizer.chat_template:
        return False
    conversation = [{"role": role, "content": text} for role, text in _TURNS]
    try:
        theirs = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        raise TemplateMismatchError(
            f"the chat template of {tokenizer.name_or_path!r} cannot render user, assistant, user: {error}; "
            f"put the published tokenizer_config.json of {family.hub_id} back"
        ) from error
    messages = tuple(Message(role, (Text(text),)) for role, text in _TURNS)
    vocabulary = Vocabulary(tokenizer, family.control_tokens, family.required_tokens)
    probe = Sample(id="probe", source=Source("chat template probe", 0), messages=messages)
    our_ids = family.render(probe, (), vocabulary, Layout(), True).input_ids
    their_ids = tokenizer(theirs, add_special_tokens=False)["input_ids"]
    if our_ids == their_ids:
        return True
    ours = str(tokenizer.decode(our_ids, skip_special_tokens=False))
    raise TemplateMismatchError(
        f"the chat template of {tokenizer.name_or_path!r} does not write the prompt of {family.title}: "
        f"{_difference(ours, theirs)}.\n  template: {theirs!r}\n  ours:     {ours!r}\n"
        "A model trained on one and asked with the other answers badly. Put the published chat_template "
        f"(tokenizer_config.json of {family.hub_id}) back; the official scripts replace it for training."
    )


def _difference(ours: str, theirs: str) -> str:
    """In words: around which turns the two prompts differ, and how."""
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
    return "; ".join(faults) or "the same words give other ids"
