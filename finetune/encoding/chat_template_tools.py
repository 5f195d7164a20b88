"""Renders tool descriptions and tool calls to text with the checkpoint's own chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from finetune.encoding.chat_template_check import FIRST_TURN, SYSTEM_TURN, TEMPLATE_FAULTS, TemplateMismatchError
from finetune.families.family import Family
from finetune.sample import Call, DataError, Message, Part, Sample, Text, Tool
from finetune.templates.prompt_types import PromptLayout
from finetune.templates.turn_order import trimmed
from finetune.utils.errors import located

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sentinels for texts whose position in the template's output is needed; made of private-use characters.
_QUESTION, _CONTENT, _NEXT = (f"\ue000{number}\ue001" for number in range(3))
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
_CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}
_MAX_CACHED = 512


class ToolWriter:
    """Renders the tools of a sample to text with the chat template of a checkpoint.

    The template is rendered once per description or call, with sentinels for all other text, so that text of a record
    is never mistaken for output of the template. Can be pickled and shared between threads.

    Args:
        family: model family.
        tokenizer: tokenizer with the chat template.
        layout: prompt layout.
        families: all families; errors list those whose templates support tools.
    """

    def __init__(
        self, family: Family, tokenizer: PreTrainedTokenizerBase, layout: PromptLayout, families: Sequence[Family]
    ) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._layout = layout
        self._able = ", ".join(each.title for each in families if "tool" in each.roles)
        self._cache: dict[str, str] = {}

    def expand(self, sample: Sample) -> Sample:
        """The sample with tool descriptions as text in the system turn and tool calls as text at the end of answers.

        Raises:
            DataError: the template does not support tools, or cannot render these.
            TemplateMismatchError: the template renders them where this family's prompt has no place for them.
        """
        calls = any(message.calls for message in sample.messages)
        if not calls and not sample.tools:
            return sample
        with located(sample.source):
            return self._expanded(sample, calls=calls)

    def _expanded(self, sample: Sample, *, calls: bool) -> Sample:
        if not self._has_tools:
            what = " and ".join(name for name, there in (("tools", sample.tools), ("tool calls", calls)) if there)
            raise DataError(
                f"has {what}, and the chat template of {self._family.title} does not support them; "
                f"use a model whose template does ({self._able}), or remove them from the record"
            )
        try:
            messages = [self._with_calls(message) if message.calls else message for message in sample.messages]
            if sample.tools:
                messages = self._with_tools(messages, sample.tools)
        except TemplateMismatchError:
            raise
        except TEMPLATE_FAULTS as error:
            raise DataError(
                f"the chat template of {self._family.title} cannot render its tools "
                f"({type(error).__name__}: {error}); correct the tool descriptions or calls"
            ) from error
        return replace(sample, messages=tuple(messages), tools=())

    @cached_property
    def _has_tools(self) -> bool:
        """Whether the template renders tools and tool calls; other templates ignore them."""
        if not self._tokenizer.chat_template:
            return False
        turns = [{"role": "user", "content": _QUESTION}]
        try:
            return self._apply(turns, [_CLOCK]) != self._apply(turns) and "clock" in self._calls(
                "", (Call("clock", {"zone": "UTC"}),)
            )
        except (*TEMPLATE_FAULTS, TemplateMismatchError):
            return False

    def _with_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
        """The turns with the tool descriptions in the system turn, which is added if there is none."""
        own = messages[0] if messages[0].role == "system" else None
        if own and self._layout.trim:
            own = trimmed(own)
        text = self._cached(["system", bool(own), tools], lambda: self._system(own is not None, tools))
        if own is None:
            return [Message("system", (Text(text),)), *messages]
        before, _, after = text.partition(_CONTENT)
        parts: tuple[Part, ...] = (Text(before), *own.parts, Text(after))
        return [replace(own, parts=parts), *messages[1:]]

    def _with_calls(self, message: Message) -> Message:
        """The answer with its calls rendered to text at its end."""
        if self._layout.trim:
            message = trimmed(message)
        text = message.text
        thinks = "</think>" in text
        spoken = text.rpartition("</think>")[2].lstrip("\n") if thinks else text
        content = _CONTENT if spoken else _NO_THOUGHT if thinks else ""
        calls = [[call.name, call.arguments] for call in message.calls]
        written = self._cached([content, calls], lambda: self._calls(content, message.calls))
        return replace(message, parts=(*message.parts, Text(written)), calls=())

    def _system(self, own: bool, tools: Sequence[Tool]) -> str:
        """The text of the system turn, with a sentinel for the record's own system text."""
        turns = [{"role": "system", "content": _CONTENT}] if own else []
        text = self._apply([*turns, {"role": "user", "content": _QUESTION}], tools)
        head, found, _ = text.removeprefix(self._layout.bos).partition(FIRST_TURN + _QUESTION)
        system = SYSTEM_TURN.fullmatch(head)
        if not found or system is None or system["system"] is None or system["system"].count(_CONTENT) != own:
            raise self._mismatch("tool descriptions outside of the system turn", text)
        return system["system"]

    def _calls(self, content: str, calls: Sequence[Call]) -> str:
        """The rendered calls after ``content``: a sentinel for text, an empty think block, or nothing."""
        made = [{"type": "function", "function": {"name": each.name, "arguments": each.arguments}} for each in calls]
        text = self._apply(
            [
                {"role": "user", "content": _QUESTION},
                {"role": "assistant", "content": content, "tool_calls": made},
                {"role": "user", "content": _NEXT},
            ]
        )
        _, asked, rest = text.partition(_QUESTION + _ANSWER)
        answer, ended, _ = rest.rpartition("<|im_end|>\n" + FIRST_TURN + _NEXT)
        if not asked or not ended or (content == _CONTENT and not answer.startswith(content)):
            raise self._mismatch("tool calls outside of the answer", text)
        return answer.removeprefix(content)

    def _apply(self, turns: list[Any], tools: Sequence[Tool] | None = None) -> str:
        given: Any = None if tools is None else list(tools)
        return str(self._tokenizer.apply_chat_template(turns, tools=given, tokenize=False))

    def _cached(self, key: Any, write: Callable[[], str]) -> str:
        name = json.dumps(key, default=str)
        if name not in self._cache:
            if len(self._cache) >= _MAX_CACHED:
                self._cache.clear()
            self._cache[name] = write()
        return self._cache[name]

    def _mismatch(self, what: str, text: str) -> TemplateMismatchError:
        return TemplateMismatchError(
            f"the chat template of {self._tokenizer.name_or_path!r} writes {what}: {text!r}; restore the published "
            f"chat_template of {self._family.hub_id}"
        )
