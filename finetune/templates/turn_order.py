"""Which turns a template accepts; the same rules for every generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.sample import DataError, Media, Message, Sample, Text
from finetune.utils.quoting import shown


def turns(
    sample: Sample, roles: Sequence[str], generate: bool, *, trim: bool = False, thinks: bool = False
) -> tuple[Message, ...]:
    """The turns to render: all for training; to generate, all untrained and without a final answer, the reference.

    Args:
        sample: the conversation.
        roles: those of the template.
        generate: to generate.
        trim: whether they lose the white space around them.
        thinks: whether the template has a place for the thinking of answers.

    Raises:
        DataError: a role that the template lacks, thinking that it has no place for, a first turn that is not the
            user's, media outside a user turn, no answer to train on, or an empty one.
    """
    messages = sample.messages
    if not thinks and (turn := next((at for at, message in enumerate(messages) if message.thought.strip()), None)):
        raise DataError(
            f"{sample.source}: turn {turn} has thinking beside its text, and the prompt of this model has no place for "
            "it; use a model that thinks (MiniCPM-V 4.5 and later, MiniCPM-o 4.5, MiniCPM-OCR), or take the key out"
        )
    for turn, message in enumerate(messages):
        _check_turn(sample, turn, message, roles)
    if trim:
        messages = tuple(trimmed(message) for message in messages)
    first = 1 if messages[0].role == "system" else 0
    if first == len(messages) or messages[first].role != "user":
        role = messages[first].role if first < len(messages) else "missing"
        raise DataError(
            f"{sample.source}: turn {first} is {role}, it must be user: a conversation starts with a question"
        )
    answered = messages[-1].role == "assistant"
    if generate:
        return tuple(replace(message, train=False) for message in (messages[:-1] if answered else messages))
    if not answered:
        raise DataError(
            f"{sample.source}: no answer: the last turn ({len(messages) - 1}) is {messages[-1].role}, "
            "training needs an assistant turn there"
        )
    return messages


def _check_turn(sample: Sample, turn: int, message: Message, roles: Sequence[str]) -> None:
    if message.role not in roles:
        known = ", ".join(roles)
        fix = "move its text to the first user turn" if message.role == "system" else "rename or remove the turn"
        raise DataError(
            f"{sample.source}: turn {turn} has role {shown(message.role, 60)}, this model's prompt has {known}; {fix}"
        )
    if message.role != "user":
        for part in message.parts:
            # In a system turn sound is the voice that MiniCPM-o is to have.
            if isinstance(part, Media) and (message.role, part.kind) != ("system", "audio"):
                raise DataError(
                    f"{sample.source}: turn {turn} ({message.role}) contains {part}; media belong into user turns"
                )
    if message.train and not message.text.strip():
        raise DataError(f"{sample.source}: turn {turn}: the answer is empty; fill it in or remove the record")


def trimmed(message: Message) -> Message:
    """The turn without the white space at its beginning and end; a medium there is left as it is."""
    parts = list(message.parts)
    if parts and isinstance(parts[0], Text):
        parts[0] = Text(parts[0].text.lstrip())
    if parts and isinstance(parts[-1], Text):
        parts[-1] = Text(parts[-1].text.rstrip())
    return replace(message, parts=tuple(parts))


def merged(parts: Sequence[Text | Media]) -> list[str | Media]:
    """The parts with neighbouring texts joined and empty ones dropped."""
    result: list[str | Media] = []
    for part in parts:
        if isinstance(part, Media):
            result.append(part)
        elif part.text:
            if result and isinstance(result[-1], str):
                result[-1] += part.text
            else:
                result.append(part.text)
    return result
