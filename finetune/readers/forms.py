"""Record formats: columns (keys of a record) and tags (keys and role names of a turn) of each format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from finetune.sample import MEDIA_COLUMNS, MediaKind

FormName = Literal["official", "sharegpt", "alpaca", "openai", "duplex"]
FORMS: tuple[FormName, ...] = get_args(FormName)

WANTED = (
    "official needs 'conversations' (turns with role and content) and 'image', 'video', 'audio'; sharegpt needs "
    "'messages' or 'conversations' and 'images', 'videos', 'audios'; alpaca needs 'instruction' and 'output'; openai "
    "needs 'messages' whose content may be a list of parts; duplex needs 'duplex' (a timeline of user "
    "audio and the model's speech)"
)
"""The keys of each format, for errors."""

RANKING = ("chosen", "rejected", "kto_tag")
"""Columns of preference data in dataset_info.json."""

CALLING = {
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_call": "function",
    "tool_call": "function",
}
"""Role names of tool turns: "tool" is a tool result, "function" an answer that consists of tool calls."""
# Role names of all formats.
_ROLE_NAMES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    **CALLING,
}


@dataclass(frozen=True, slots=True)
class Columns:
    """The key of each column in a record; None for no such column. Defaults are those of LLaMA-Factory."""

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
        """The key of the media files of a kind."""
        return getattr(self, MEDIA_COLUMNS[kind])


@dataclass(frozen=True, slots=True)
class Tags:
    """The keys of a turn and its role names; defaults are those of LLaMA-Factory.

    Attributes:
        role_tag: key of the role.
        content_tag: key of the text.
        user_tag: role name of the user.
        assistant_tag: role name of the assistant.
        observation_tag: role name of a tool result.
        function_tag: role name of an answer that calls a tool.
        system_tag: role name of the system turn.
        loose: also accept the role names of other formats (no tags were given).
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
        """Role by role name: system, user, assistant, tool, or function for an answer that calls a tool."""
        named = {
            self.system_tag: "system",
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.observation_tag: "tool",
            self.function_tag: "function",
        }
        names = {name: role for name, role in named.items() if name is not None}
        return {**_ROLE_NAMES, **names} if self.loose else names


OWN_NAMES = Columns("instruction", "input", "output", "history", None, "system", "tools", "images", "videos", "audios")
"""Default column names without dataset_info.json; the key of the turns depends on the records."""
FROM_VALUE = Tags(loose=True)
ROLE_CONTENT = Tags("role", "content", "user", "assistant", "tool", loose=True)

COLUMN_NAMES = tuple(entry.name for entry in fields(Columns))
TAG_NAMES = tuple(entry.name for entry in fields(Tags) if entry.name != "loose")


@dataclass(frozen=True, slots=True)
class Form:
    """The format of records.

    Attributes:
        name: one of FORMS.
        columns: columns; not used by the official format.
        tags: tags of sharegpt and openai.
    """

    name: FormName
    columns: Columns = Columns()
    tags: Tags = Tags()


def named_columns(given: Mapping[str, str | None]) -> Columns:
    """The given columns; if any is given, the others do not exist, as in LLaMA-Factory."""
    return Columns(**{name: given.get(name) for name in COLUMN_NAMES})


def named_tags(given: Mapping[str, str | None]) -> Tags:
    """The given tags; others keep their default, unless that name is used by a given tag.

    In that case LLaMA-Factory has no such role and skips the records.
    """
    named = {name: word for name, word in given.items() if word is not None}
    values: dict[str, Any] = dict(named)
    for entry in fields(Tags):
        if entry.name.endswith("_tag") and entry.name not in named and entry.default in named.values():
            values[entry.name] = None
    return Tags(**values)
