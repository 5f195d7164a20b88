"""Validates the turns of a conversation against the roles of a template; shared by all templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.sample import DataError, Media, Message, Sample, Text
from finetune.utils.quoting import shown


def turns(
    sample: Sample, roles: Sequence[str], generate: bool, *, trim: bool = False, thinks: bool = False
) -> tuple[Message, ...]:
    """The turns to render: all for training; for generation without labels and without the final answer.

    Args:
        sample: the conversation.
        roles: roles of the template.
        generate: for generation.
        trim: whether white space around turns is stripped.
        thinks: whether the template supports thinking.

    Raises:
        DataError: an unsupported role, unsupported thinking, a first turn that is not a user turn, media outside of
            user turns, no answer to train, or an empty one.
    """
    messages = sample.messages
    if not thinks and (turn := next((at for at, message in enumerate(messages) if message.thought.strip()), None)):
        raise DataError(
            f"turn {turn} has thinking under a key, which this model does not support; use a "
            "model with thinking (MiniCPM-V 4.5 and later, MiniCPM-o 4.5, MiniCPM-OCR), or remove the key"
        )
    for turn, message in enumerate(messages):
        _check_turn(sample, turn, message, roles)
    if trim:
        messages = tuple(trimmed(message) for message in messages)
    first = 1 if messages[0].role == "system" else 0
    if first == len(messages) or messages[first].role != "user":
        role = messages[first].role if first < len(messages) else "missing"
        raise DataError(f"turn {first} is {role}, it must be user: a conversation starts with a user turn")
    answered = messages[-1].role == "assistant"
    if generate:
        return tuple(replace(message, train=False) for message in (messages[:-1] if answered else messages))
    if not answered:
        notes = f" ({'; '.join(sample.notes)})" if sample.notes else ""
        raise DataError(
            f"no answer: the last turn ({len(messages) - 1}) is {messages[-1].role}, "
            f"training needs an assistant turn there{notes}"
        )
    return messages


def _check_turn(sample: Sample, turn: int, message: Message, roles: Sequence[str]) -> None:
    if message.role not in roles:
        known = ", ".join(roles)
        fix = "move its text to the first user turn" if message.role == "system" else "rename or remove the turn"
        raise DataError(f"turn {turn} has role {shown(message.role, 60)}, this model's prompt has {known}; {fix}")
    if message.role != "user":
        for part in message.parts:
            # Audio in a system turn is the voice prompt of MiniCPM-o.
            if isinstance(part, Media) and (message.role, part.kind) != ("system", "audio"):
                raise DataError(f"turn {turn} ({message.role}) contains {part}; media belong into user turns")
    if message.train and not message.text.strip():
        raise DataError(f"turn {turn}: the answer is empty; add it or remove the record")


def trimmed(message: Message) -> Message:
    """The turn without white space at its start and end; media there are kept."""
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
