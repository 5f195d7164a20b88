"""What a turn says beside its text, under every name in use, in every form that has turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.readers import read, record_keys
from finetune.sample import Call, DataError, Media, Sample

FORMS = ("official", "sharegpt", "openai")
IN_EVERY_FORM = pytest.mark.parametrize("form", FORMS)
TAG = {"image": "a.png", "video": "clip.mp4", "audio": "sound.mp3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(data / name)
    for name in ("clip.mp4", "sound.mp3"):
        (data / name).write_bytes(b"")
    return data


def one(folder: Path, record: Any, form: Any = "auto") -> Sample:
    (folder / "data.json").write_text(json.dumps([record]))
    return read(folder / "data.json", data_format=form)[0]


def talk(*more: dict[str, Any], **top: Any) -> dict[str, Any]:
    """Two exchanges, each turn with more keys, in a record with more keys."""
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    return {"messages": [{**turn, **extra} for turn, extra in zip(turns, [*more, {}, {}, {}, {}], strict=False)], **top}


def trained(sample: Sample) -> list[int]:
    return [index for index, message in enumerate(sample.messages) if message.train]


def shown(sample: Sample) -> list[str]:
    return [
        "".join(f"[{part.files[0].name}]" if isinstance(part, Media) else part.text for part in message.parts)
        for message in sample.messages
    ]


@IN_EVERY_FORM
@pytest.mark.parametrize("name", record_keys.LOSS)
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0)])
def test_words_for_loss(folder: Path, form: str, name: str, no: Any, yes: Any) -> None:
    record = talk({name: no}, {name: no}, {}, {name: yes})
    assert trained(one(folder, record, form)) == [3]
    assert trained(one(folder, talk({}, {name: yes}, {}, {name: no}), form)) == [1]
    with pytest.raises(DataError, match=rf"turn 0: '{name}' is 1 in a user turn; only answers are trained, remove it"):
        one(folder, talk({name: yes}), form)


@IN_EVERY_FORM
@pytest.mark.parametrize("name", record_keys.LOSS)
def test_weights_between_and_two_that_differ(folder: Path, form: str, name: str) -> None:
    with pytest.raises(DataError, match=rf"turn 1: '{name}' is 0.5; .*answers are trained in full or not at all"):
        one(folder, talk({}, {name: 0.5}), form)
    other = next(each for each in record_keys.LOSS if each != name)
    assert trained(one(folder, talk({}, {name: 0, other: False}), form)) == [3]
    with pytest.raises(DataError, match=r"turn 1: .* which are synonyms; keep one"):
        one(folder, talk({}, {name: 0, other: 1}), form)


@IN_EVERY_FORM
@pytest.mark.parametrize("name", record_keys.SYSTEM)
def test_words_for_the_system_turn(folder: Path, form: str, name: str) -> None:
    sample = one(folder, talk(**{name: "Be brief."}), form)
    assert (sample.messages[0].role, sample.messages[0].text) == ("system", "Be brief.")
    assert sample.notes == ()
    turn = {"role": "system", "content": "Be brief."}
    again = {"messages": [turn, *talk()["messages"]], name: "Be brief."}
    assert one(folder, again, form).messages == sample.messages
    with pytest.raises(DataError, match=rf"'{name}' is \"Be long.\" and the system turn is \"Be brief.\"; keep one"):
        one(folder, {**again, name: "Be long."}, form)
    with pytest.raises(DataError, match="which are synonyms"):
        one(folder, talk(**{name: "a", next(each for each in record_keys.SYSTEM if each != name): "b"}), form)
    with pytest.raises(DataError, match=rf"'{name}' is a number; the system prompt must be a string"):
        one(folder, talk(**{name: 3}), form)


def test_a_system_prompt_beside_images(folder: Path) -> None:
    record = {"image": "a.png", "conversations": talk()["messages"], "system_prompt": "Be brief."}
    assert shown(one(folder, record))[:2] == ["Be brief.", "[a.png]\na"]
    alpaca = {"instruction": "a", "output": "b", "system_prompt": "Be brief."}
    assert shown(one(folder, alpaca)) == ["Be brief.", "a", "b"]


@IN_EVERY_FORM
@pytest.mark.parametrize("name", record_keys.THOUGHT)
def test_thinking(folder: Path, form: str, name: str) -> None:
    sample = one(folder, talk({}, {name: "Hm."}, {}, {name: ""}), form)
    assert [message.thought for message in sample.messages] == ["", "Hm.", "", ""]
    assert shown(sample) == list("abcd")
    with pytest.raises(DataError, match=rf"turn 0: '{name}' in a user turn; only answers have thinking"):
        one(folder, talk({name: "Hm."}), form)
    with pytest.raises(DataError, match=rf"turn 1: '{name}' is a list; thinking must be a string"):
        one(folder, talk({}, {name: ["Hm."]}), form)


@IN_EVERY_FORM
@pytest.mark.parametrize("kind", record_keys.IN_TURN)
@pytest.mark.parametrize("many", [False, True])
def test_files_of_a_turn(folder: Path, form: str, kind: Any, many: bool) -> None:
    file = TAG[kind]
    name, value = (f"{kind}s", [file]) if many else (kind, file)
    assert shown(one(folder, talk({}, {}, {name: value}), form)) == ["a", "b", f"[{file}]\nc", "d"]
    tagged = {name: value, "content": f"See <{kind}> and <box>"}
    assert shown(one(folder, talk({}, {}, tagged), form))[2] == f"See [{file}] and <box>"
    with pytest.raises(DataError, match=rf"turn 2 has 2 <{kind}> in its text and names 1 files of that kind"):
        one(folder, talk({}, {}, {**tagged, "content": f"<{kind}><{kind}>"}), form)
    with pytest.raises(DataError, match=rf"turn 1: '{name}' in a assistant turn; media belong into user turns"):
        one(folder, talk({}, {name: value}), form)


def test_files_of_turns_beside_those_of_the_record(folder: Path) -> None:
    asked = ({"content": "<image>"}, {}, {"content": "<image>?", "image": "b.png"})
    assert shown(one(folder, talk(*asked, images=["a.png"]))) == ["[a.png]", "b", "[b.png]?", "d"]
    turns = talk(*asked)["messages"]
    assert shown(one(folder, {"image": "a.png", "conversations": turns})) == ["[a.png]", "b", "[b.png]?", "d"]
    listed = {"content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>"}], "image": "b.png"}
    assert shown(one(folder, talk(listed))) == ["[b.png]\n[a.png]<image>", "b", "c", "d"]


@pytest.mark.parametrize("name", [name for name in record_keys.COMPARED if name != "chosen"])
@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_answers_that_are_compared(folder: Path, form: str, name: str) -> None:
    value = True if name == "kto_tag" else "worse"
    with pytest.raises(DataError, match=rf"'{name}': preference data; --stage dpo trains on pairs"):
        one(folder, talk(**{name: value}), form)
    late = [talk()] * 61 + [talk(**{name: value})] + [talk()] * 60
    (folder / "late.json").write_text(json.dumps(late))
    with pytest.raises(DataError, match=rf"record 61: has '{name}': preference data"):
        read(folder / "late.json")[61]


CALL = {"name": "clock", "arguments": {"zone": "UTC"}}
WAYS: dict[str, Any] = {
    "tool_calls": {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
    "arguments as text": {"content": "", "tool_calls": [{"function": {**CALL, "arguments": '{"zone": "UTC"}'}}]},
    "bare": {"tool_calls": [CALL]},
    "as text": {"tool_calls": json.dumps([CALL])},
    "function_call": {"content": None, "function_call": {**CALL, "arguments": '{"zone":"UTC"}'}},
    "turn": {"role": "function_call", "content": json.dumps(CALL)},
    "list in a turn": {"role": "tool_call", "content": json.dumps([CALL])},
}


@IN_EVERY_FORM
@pytest.mark.parametrize("way", WAYS)
def test_calls(folder: Path, form: str, way: str) -> None:
    result = {"role": "tool", "content": "12:00"}
    turns = [talk()["messages"][0], {"role": "assistant", **WAYS[way]}, result, talk()["messages"][3]]
    sample = one(folder, {"messages": turns, "tools": json.dumps([{"type": "function", "function": CALL}])}, form)
    assert sample.messages[1].calls == (Call("clock", {"zone": "UTC"}),)
    assert [message.role for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert (trained(sample), shown(sample)) == ([1, 3], ["a", "", "12:00", "d"])
    assert sample.tools == ({"type": "function", "function": CALL},)


@IN_EVERY_FORM
def test_calls_in_turns_of_their_own_are_one_answer(folder: Path, form: str) -> None:
    call = {"role": "function_call", "content": json.dumps(CALL)}
    thought = {"role": "function_call", "content": "<think>\nHm.\n</think>\n" + json.dumps(CALL)}
    ask, _, _, last = talk()["messages"]
    results = [{"role": "observation", "content": "1"}, {"role": "function", "content": "2"}]
    for first in (thought, {"role": "assistant", "content": "Let me see."}):
        sample = one(folder, {"messages": [ask, first, call, *results, last]}, form)
        assert [message.role for message in sample.messages] == ["user", "assistant", "tool", "tool", "assistant"]
        assert len(sample.messages[1].calls) == (2 if first is thought else 1)


def test_text_of_the_model_stays_text(folder: Path) -> None:
    text = "<tool_call>\n{}\n</tool_call>"
    call = {"role": "function_call", "content": text}
    sample = one(folder, {"messages": [talk()["messages"][0], call]})
    assert (sample.messages[1].text, sample.messages[1].calls) == (text, ())


def called(**turn: Any) -> dict[str, Any]:
    ask, _, _, last = talk()["messages"]
    return {"messages": [ask, {"role": "assistant", "content": "", **turn}, {"role": "tool", "content": "x"}, last]}


BAD: list[tuple[dict[str, Any], str]] = [
    (talk(tools="[{"), r"'tools' is not JSON \(.*character 2\); correct it"),
    (talk(tools=[3]), "'tools', entry 0 is a number; it must be an object"),
    (talk(tools=[{"type": "function"}]), r"'tools', entry 0 has no name \(found 'type'\)"),
    (talk(tools=3), "'tools' is a number; it must be a list of descriptions"),
    (called(tool_calls=[{"function": {}}]), "turn 1: 'tool_calls' has .* where a call belongs; write name and arg"),
    (called(tool_calls=[{"name": "a", "arguments": "x"}]), "turn 1: 'tool_calls' the arguments of 'a' is not JSON"),
    (
        called(tool_calls=[{"name": "a", "arguments": [1]}]),
        r"turn 1: 'tool_calls' has \[1\] for the arguments of 'a'; they must be an obj",
    ),
    (called(tool_calls=[CALL], function_call=CALL), "turn 1 has 'tool_calls' and 'function_call'; keep one"),
    (called(tool_calls=[CALL], content="<tool_call>"), "turn 1 has <tool_call> in its text and tool calls under a key"),
    (talk({"tool_calls": [CALL]}), "turn 0: 'tool_calls' in a user turn; only answers call tools"),
    (called(role="function_call", content="{'name': 1}"), "turn 1, which calls a tool, is not JSON"),
]


@IN_EVERY_FORM
@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_calls(folder: Path, form: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"record 0: {message}"):
        one(folder, record, form)


@IN_EVERY_FORM
def test_results_in_disorder(folder: Path, form: str) -> None:
    ask, _, _, last = talk()["messages"]
    calls = {"role": "assistant", "content": "", "tool_calls": [{"id": each, "function": CALL} for each in "12"]}

    def record(*ids: str) -> dict[str, Any]:
        results = [{"role": "tool", "content": each, "tool_call_id": each} for each in ids]
        return {"messages": [ask, calls, *results, last]}

    assert shown(one(folder, record("1", "2"), form))[2:4] == ["1", "2"]
    with pytest.raises(DataError, match="turn 2: the tool results are not in the order of their calls"):
        one(folder, record("2", "1"), form)
    with pytest.raises(DataError, match="turn 3: 'tool_call_id' is \"3\", but no preceding call"):
        one(folder, record("1", "3"), form)
