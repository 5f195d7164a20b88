"""Reads tool schemas and tool calls of records, in all common formats, and checks the order of tool results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data_files.json_values import ValueFault, json_cell, json_type, parse, written
from finetune.readers import record_keys
from finetune.sample import Call, DataError, Tool
from finetune.utils.quoting import words_of

_CLOSING = "</think>"
_WRITTEN = "<tool_call>"


def read_tools(record: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Tool, ...]:
    """The tool descriptions of a record, unmodified.

    Args:
        record: the record; tools are a list of objects, or JSON text of one.
        names: keys of the tools.

    Raises:
        DataError: not a list of objects, or a tool without name.
    """
    found = record_keys.alone(record, names, "")
    if found is None:
        return ()
    name, given = found
    if isinstance(given, str) and not given.strip():
        return ()
    tools = _json(given, repr(name))
    if not tools:
        return ()
    if not isinstance(tools, (list, tuple)):
        raise DataError(f"{name!r} is {json_type(tools)}; it must be a list of descriptions of tools")
    return tuple(_tool(json_cell(tool), f"{name!r}, entry {number}") for number, tool in enumerate(tools))


def _tool(tool: Any, where: str) -> Tool:
    if not isinstance(tool, dict):
        raise DataError(f"{where} is {json_type(tool)}; it must be an object that describes a tool")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has no name (found {words_of(tool)}); write name, description, parameters")
    return tool


def read_calls(given: Mapping[str, Any], role: str, number: int) -> tuple[Call, ...]:
    """The tool calls of a turn under their own key.

    Raises:
        DataError: the turn is not an answer, or a call has no name, or arguments that are not an object.
    """
    found = next(((name, given[name]) for name in record_keys.CALLS if given.get(name)), None)
    if found is None:
        return ()
    name, value = found
    if all(given.get(each) for each in record_keys.CALLS):
        raise DataError(f"turn {number} has {' and '.join(map(repr, record_keys.CALLS))}; keep one")
    if role not in ("assistant", "function"):
        raise DataError(f"turn {number}: {name!r} in a {role} turn; only answers call tools")
    where = f"turn {number}: {name!r}"
    return _calls(_json(value, where), where)


def split_calls(text: str, number: int) -> tuple[str, tuple[Call, ...]]:
    """The text of a "function" turn without its JSON tool calls, and the calls; other text is returned unchanged.

    Raises:
        DataError: a call has no name, or arguments that are not an object.
    """
    before, closing, rest = text.rpartition(_CLOSING)
    if rest.lstrip()[:1] not in ("{", "["):
        return text, ()
    where = f"turn {number}, which calls a tool,"
    return before + closing, _calls(_json(rest, where), where)


def check_result_order(turns: Sequence[Mapping[str, Any]]) -> None:
    """Checks that tool results are in the order of their calls, since prompts have no call ids.

    Raises:
        DataError: the id of a result is not that of the next call.
    """
    waiting: list[Any] = []
    for number, turn in enumerate(turns):
        calls, result = turn.get(record_keys.CALLS[0]), turn.get(record_keys.RESULT_OF)
        if calls:
            listed = json_cell(calls)
            each = listed if isinstance(listed, (list, tuple)) else [listed]
            waiting = [call.get("id") if isinstance(call, dict) else None for call in each]
        elif result is not None and all(waiting):
            if result not in waiting:
                raise DataError(
                    f"turn {number}: {record_keys.RESULT_OF!r} is {written(result)}, but no preceding call "
                    "without a result has this id; correct it"
                )
            if waiting.pop(0) != result:
                raise DataError(
                    f"turn {number}: the tool results are not in the order of their calls, and prompts have "
                    "no call ids; put them in order"
                )


def check_no_call_in_text(text: str, number: int) -> None:
    """Refuses an answer with tool calls both in its text and under a key.

    Raises:
        DataError: the text of the answer has one.
    """
    if _WRITTEN in text:
        raise DataError(f"turn {number} has {_WRITTEN} in its text and tool calls under a key; keep one")


def _calls(given: Any, where: str) -> tuple[Call, ...]:
    return tuple(_call(each, where) for each in (given if isinstance(given, (list, tuple)) else [given]))


def _call(given: Any, where: str) -> Call:
    given = json_cell(given)
    function = json_cell(given.get("function", given)) if isinstance(given, dict) else given
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        found = f"an object with {words_of(function)}" if isinstance(function, dict) else json_type(function)
        raise DataError(f"{where} has {found} where a call belongs; write name and arguments")
    name = function["name"]
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where} the arguments of {name!r}") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"{where} has {written(arguments)} for the arguments of {name!r}; they must be an object")
    return Call(name, arguments)


def _json(given: Any, where: str) -> Any:
    """A value, parsed if it is JSON text."""
    if not isinstance(given, str):
        return given
    try:
        return parse(given)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg}, character {error.pos}); correct it") from error
    except ValueFault as error:
        raise DataError(f"{where} {error}") from error
