"""Forms of records: which columns hold what, and by which words roles are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from finetune.sample import MEDIA_COLUMNS, MediaKind

FormName = Literal["official", "sharegpt", "alpaca", "openai"]
FORMS: tuple[FormName, ...] = get_args(FormName)

WANTED = (
    "official wants 'conversations' (turns with role and content) and 'image', 'video', 'audio'; sharegpt wants "
    "'messages' or 'conversations' and 'images', 'videos', 'audios'; alpaca wants 'instruction' and 'output'; openai "
    "wants 'messages' whose content may be a list of parts"
)
"""Which keys each form wants, for errors."""

RANKING = ("chosen", "rejected", "kto_tag")
"""Columns that a description may name for answers that are compared."""

CALLING = {
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_call": "function",
    "tool_call": "function",
}
"""Words for turns of tools; what they mean here is tool for a result, and function for an answer that is its calls."""
# Words that any of the vocabularies uses.
_WORDS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    **CALLING,
}


@dataclass(frozen=True, slots=True)
class Columns:
    """The key of a record that holds each thing; None where the records have none. Defaults are LLaMA-Factory's."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None

    def media(self, kind: MediaKind) -> str | None:
        """The key of the files of a kind."""
        return getattr(self, MEDIA_COLUMNS[kind])


@dataclass(frozen=True, slots=True)
class Tags:
    """The keys of a turn and the words for its roles; defaults are LLaMA-Factory's.

    Attributes:
        role_tag: key of the role.
        content_tag: key of the text.
        user_tag: word for the user.
        assistant_tag: word for the model.
        observation_tag: word for the result of a tool.
        function_tag: word for an answer that calls a tool.
        system_tag: word for the system turn.
        loose: also understand the words of the other vocabularies (nobody named any).
    """

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"
    loose: bool = False

    @property
    def roles(self) -> dict[str, str]:
        """Role by word: system, user, assistant, tool, or function for an answer that calls a tool."""
        named = {
            self.system_tag: "system",
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.observation_tag: "tool",
            self.function_tag: "function",
        }
        words = {word: role for word, role in named.items() if word is not None}
        return {**_WORDS, **words} if self.loose else words


OWN_NAMES = Columns("instruction", "input", "output", "history", None, "system", "tools", "images", "videos", "audios")
"""Every column under its own name, as records are read that nobody described; messages depend on the records."""
FROM_VALUE = Tags(loose=True)
ROLE_CONTENT = Tags("role", "content", "user", "assistant", "tool", loose=True)

COLUMN_NAMES = tuple(entry.name for entry in fields(Columns))
TAG_NAMES = tuple(entry.name for entry in fields(Tags) if entry.name != "loose")


@dataclass(frozen=True, slots=True)
class Form:
    """How records are read.

    Attributes:
        name: one of FORMS.
        columns: not used by the official form.
        tags: of sharegpt and openai.
    """

    name: FormName
    columns: Columns = Columns()
    tags: Tags = Tags()


def named_columns(given: Mapping[str, str | None]) -> Columns:
    """The columns somebody named; once any is named, the others do not exist, as in LLaMA-Factory."""
    return Columns(**{name: given.get(name) for name in COLUMN_NAMES})


def named_tags(given: Mapping[str, str | None]) -> Tags:
    """The tags somebody named; the others keep their default, unless its word is taken.

    LLaMA-Factory knows no such turns then and skips their records.
    """
    named = {name: word for name, word in given.items() if word is not None}
    values: dict[str, Any] = dict(named)
    for entry in fields(Tags):
        if entry.name.endswith("_tag") and entry.name not in named and entry.default in named.values():
            values[entry.name] = None
    return Tags(**values)
