"""Tools in prompts, as the checkpoint's own chat template writes them: descriptions, and the calls of answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from finetune.encoding.chat_template_check import FIRST_TURN, HEAD, TEMPLATE_FAULTS, TemplateMismatchError
from finetune.families.family import Family
from finetune.sample import Call, DataError, Message, Part, Sample, Text, Tool
from finetune.templates.rendering import Layout
from finetune.templates.turn_order import trimmed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stand for texts whose places are looked for in what the template writes; of characters for private use.
_QUESTION, _CONTENT, _NEXT = (f"\ue000{number}\ue001" for number in range(3))
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
_CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}
_MOST_REMEMBERED = 512


class ToolWriter:
    """Writes tools into samples as text, by the chat template of a checkpoint.

    What the template writes for a description or a call is asked of it once, with marks in the place of all other text,
    so that text of the record is never searched for the template's words. Can be pickled and shared between threads.

    Args:
        family: the generation.
        tokenizer: has the template.
        layout: how prompts are written.
        families: all there are; errors name those whose templates have tools.
    """

    def __init__(
        self, family: Family, tokenizer: PreTrainedTokenizerBase, layout: Layout, families: Sequence[Family]
    ) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._layout = layout
        self._able = ", ".join(each.title for each in families if "tool" in each.roles)
        self._remembered: dict[str, str] = {}

    def written(self, sample: Sample) -> Sample:
        """The sample with its tools in the system turn and the calls at the ends of their answers, as text.

        Raises:
            DataError: it has tools and the template has none, or the template cannot write these.
            TemplateMismatchError: the template writes them in a way that this family's prompt cannot.
        """
        calls = any(message.calls for message in sample.messages)
        if not calls and not sample.tools:
            return sample
        if not self._has_tools:
            what = " and ".join(name for name, there in (("tools", sample.tools), ("calls of tools", calls)) if there)
            raise DataError(
                f"{sample.source}: has {what}, and the chat template of {self._family.title} has no place for them; "
                f"use a model whose template has ({self._able}), or take them out"
            )
        try:
            messages = [self._with_calls(message) if message.calls else message for message in sample.messages]
            if sample.tools:
                messages = self._with_tools(messages, sample.tools)
        except TemplateMismatchError:
            raise
        except TEMPLATE_FAULTS as error:
            raise DataError(
                f"{sample.source}: the chat template of {self._family.title} cannot write its tools "
                f"({type(error).__name__}: {error}); correct their descriptions or calls"
            ) from error
        return replace(sample, messages=tuple(messages), tools=())

    @cached_property
    def _has_tools(self) -> bool:
        """Whether the template writes tools and calls at all; others pass over them."""
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
        """The turns with the descriptions in the system turn, which is made where there is none."""
        own = messages[0] if messages[0].role == "system" else None
        if own and self._layout.trim:
            own = trimmed(own)
        text = self._remember(["system", bool(own), tools], lambda: self._system(own is not None, tools))
        if own is None:
            return [Message("system", (Text(text),)), *messages]
        before, _, after = text.partition(_CONTENT)
        parts: tuple[Part, ...] = (Text(before), *own.parts, Text(after))
        return [replace(own, parts=parts), *messages[1:]]

    def _with_calls(self, message: Message) -> Message:
        """An answer whose calls are text behind its own."""
        if self._layout.trim:
            message = trimmed(message)
        text = message.text
        thinks = "</think>" in text
        spoken = text.rpartition("</think>")[2].lstrip("\n") if thinks else text
        content = _CONTENT if spoken else _NO_THOUGHT if thinks else ""
        calls = [[call.name, call.arguments] for call in message.calls]
        written = self._remember([content, calls], lambda: self._calls(content, message.calls))
        return replace(message, parts=(*message.parts, Text(written)), calls=())

    def _system(self, own: bool, tools: Sequence[Tool]) -> str:
        """The text of the system turn, with a mark in the place of the record's own."""
        turns = [{"role": "system", "content": _CONTENT}] if own else []
        text = self._apply([*turns, {"role": "user", "content": _QUESTION}], tools)
        head, found, _ = text.removeprefix(self._layout.bos).partition(FIRST_TURN + _QUESTION)
        system = HEAD.fullmatch(head)
        if not found or system is None or system["system"] is None or system["system"].count(_CONTENT) != own:
            raise self._mismatch("descriptions of tools outside of the system turn", text)
        return system["system"]

    def _calls(self, content: str, calls: Sequence[Call]) -> str:
        """What stands behind the text of an answer, by the kind of its text: a mark, a thought alone, or nothing."""
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
            raise self._mismatch("calls of tools outside of the answer", text)
        return answer.removeprefix(content)

    def _apply(self, turns: list[Any], tools: Sequence[Tool] | None = None) -> str:
        given: Any = None if tools is None else list(tools)
        return str(self._tokenizer.apply_chat_template(turns, tools=given, tokenize=False))

    def _remember(self, key: Any, write: Callable[[], str]) -> str:
        name = json.dumps(key, default=str)
        if name not in self._remembered:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[name] = write()
        return self._remembered[name]

    def _mismatch(self, what: str, text: str) -> TemplateMismatchError:
        return TemplateMismatchError(
            f"the chat template of {self._tokenizer.name_or_path!r} writes {what}: {text!r}; put the published "
            f"chat_template of {self._family.hub_id} back"
        )
