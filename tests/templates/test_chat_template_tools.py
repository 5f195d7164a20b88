"""Tools and calls of every family that has them are what the checkpoint's own chat template writes, token for token."""

from __future__ import annotations

import json
import pickle
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chatml_samples import encoder as chatml_encoder
from golden_tokenizers import tokenizer
from transformers import AutoTokenizer

from finetune.encoding.chat_template_check import TemplateMismatchError
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.families import FAMILIES, by_name
from finetune.readers import read
from finetune.sample import DataError, Sample
from finetune.templates.prompt_types import IGNORE
from finetune.tiny import chatml_tokenizers, native_folders

WITH_TOOLS = ("o2_6", "v4_5", "o4_5", *(family.name for family in FAMILIES if family.network is None))
WITHOUT = ("v2_0", "llama3_v2_5", "v2_6", "v4_0")
EVERY = pytest.mark.parametrize("family", WITH_TOOLS)


@cache
def encoder(family: str) -> Encoder:
    """An encoder over the tokenizer of a tiny checkpoint."""
    if family in chatml_tokenizers.CHATML:
        return chatml_encoder(family)
    if family in WITHOUT:
        recorded = tokenizer({"v2_0": "minicpm", "llama3_v2_5": "llama3"}[family])
        return Encoder(by_name(family), recorded, {"query_num": 4})
    with tempfile.TemporaryDirectory() as folder:
        native_folders.write_native(by_name(family), Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text())
        return Encoder(by_name(family), AutoTokenizer.from_pretrained(folder), config)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter in einer Stadt: <|im_end|>, 天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PARIS, TIME = call("weather", city="Paris é 天", days=2), call("clock")
ASK, END = turn("user", "How is it?"), turn("assistant", "Rain, at noon.")
TALKS: dict[str, list[dict[str, Any]]] = {
    "described": [ASK, END],
    "system": [turn("system", "Be brief."), ASK, END],
    "call": [ASK, turn("assistant", "", tool_calls=[PARIS]), turn("tool", "rain"), END],
    "said before": [ASK, turn("assistant", "Let me see.", tool_calls=[PARIS]), turn("tool", "rain"), END],
    "parallel": [
        turn("system", "Be brief."),
        ASK,
        turn("assistant", "Two things.", tool_calls=[PARIS, TIME]),
        turn("tool", "rain"),
        turn("tool", '{"time": "12:00"}'),
        END,
    ],
    "chain": [
        ASK,
        turn("assistant", "", tool_calls=[PARIS]),
        turn("tool", "rain"),
        turn("assistant", "And now the time.", tool_calls=[TIME]),
        turn("tool", "12:00"),
        END,
        turn("user", "Thanks"),
        turn("assistant", "Yes."),
    ],
    "call at the end": [ASK, turn("assistant", "", tool_calls=[PARIS, TIME])],
    "later call at the end": [ASK, END, turn("user", "Now?"), turn("assistant", "Hm.", tool_calls=[TIME])],
}
THINKS: dict[str, list[dict[str, Any]]] = {
    "call": [ASK, turn("assistant", "", reasoning_content="I ask.", tool_calls=[PARIS]), turn("tool", "rain"), END],
    "text and call": [
        ASK,
        turn("assistant", "So.", reasoning_content="Hm.\n", tool_calls=[PARIS]),
        turn("tool", "x"),
        END,
    ],
    "last": [ASK, END, turn("user", "Why?"), turn("assistant", "So.", reasoning_content="\nI see.")],
    "earlier": [ASK, {**END, "reasoning_content": "Gone."}, turn("user", "Why?"), turn("assistant", "So.")],
}


def sample(tmp_path: Path, record: dict[str, Any]) -> Sample:
    (tmp_path / "data.json").write_text(json.dumps([record], ensure_ascii=False))
    return read(tmp_path / "data.json")[0]


def ids(family: str, turns: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """What the chat template and the tokenizer give; the control tokens in the text of the record are none for us."""
    own = encoder(family).tokenizer
    text = str(own.apply_chat_template(turns, tools=tools, tokenize=False))
    pieces = text.split(MARK)
    words = encoder(family).prompt_tokenizer
    assert len(pieces) <= 2
    if len(pieces) == 1:
        return own(text, add_special_tokens=False)["input_ids"]
    # The one mark that is text is spelled by our tokenizer, with all that stands before the next mark of the template.
    before, after = pieces[0].rpartition("<|im_start|>"), pieces[1].partition("<|im_end|>")
    left = own(before[0] + before[1], add_special_tokens=False)["input_ids"]
    right = own(after[1] + after[2], add_special_tokens=False)["input_ids"]
    return [*left, *words.text(before[2] + MARK + after[0]), *right]


MARK = "<|im_end|>, 天气"


@EVERY
@pytest.mark.parametrize("name", TALKS)
def test_tools_are_written_as_the_chat_template_writes_them(family: str, name: str, tmp_path: Path) -> None:
    for tools in ([WEATHER, CLOCK], [CLOCK["function"]], None):
        if tools is None and name == "described":
            continue
        record = {"messages": TALKS[name], **({"tools": tools} if tools else {})}
        assert encoder(family).render(sample(tmp_path, record), ()).input_ids == ids(family, TALKS[name], tools)


@pytest.mark.parametrize("family", WITH_TOOLS[1:])
@pytest.mark.parametrize("name", THINKS)
def test_thinking_beside_the_text(family: str, name: str, tmp_path: Path) -> None:
    record = {"messages": THINKS[name]}
    assert encoder(family).render(sample(tmp_path, record), ()).input_ids == ids(family, THINKS[name])


@EVERY
def test_calls_are_trained_and_results_are_not(family: str, tmp_path: Path) -> None:
    chosen = encoder(family)
    rendered = chosen.render(sample(tmp_path, {"messages": TALKS["parallel"], "tools": [WEATHER, CLOCK]}), ())
    runs, before = [], IGNORE
    for label in rendered.labels:
        if label != IGNORE:
            runs += [[]] if before == IGNORE else []
            runs[-1].append(label)
        before = label
    call_run, answer = (str(chosen.tokenizer.decode(run)) for run in runs)
    assert call_run.startswith("Two things.")
    assert call_run.endswith("</tool_call><|im_end|>")
    assert call_run.count("<tool_call>") == 2
    assert "Paris é 天" in call_run
    assert answer == "Rain, at noon.<|im_end|>"


@EVERY
def test_text_of_a_record_cannot_end_the_turn(family: str, tmp_path: Path) -> None:
    """Also inside descriptions, arguments and results, whose words the template repeats."""
    chosen = encoder(family)
    end = chosen.prompt_tokenizer.control("<|im_end|>")
    turns = [ASK, turn("assistant", "", tool_calls=[call("clock", zone="<|im_end|>")]), turn("tool", "<|im_end|>"), END]
    rendered = chosen.render(sample(tmp_path, {"messages": turns, "tools": [WEATHER]}), ())
    assert rendered.input_ids.count(end) == 5  # system, question, call, result, answer


@EVERY
def test_long_samples_and_other_processes(family: str, tmp_path: Path) -> None:
    chosen = encoder(family)
    record = {"messages": [ASK, END, *TALKS["parallel"][1:]], "tools": [WEATHER]}
    conversation = sample(tmp_path, record)
    whole = chosen.render(conversation, ()).input_ids
    assert pickle.loads(pickle.dumps(chosen)).render(conversation, ()).input_ids == whole
    without = ids(family, TALKS["parallel"][1:], [WEATHER])
    chosen.max_length = len(whole) - 1
    try:
        fitted = LengthPolicy(chosen, "shrink").fit(conversation)
        assert (fitted.outcome, fitted.rendered.input_ids) == ("turns removed", without)
    finally:
        chosen.max_length = None


@pytest.mark.parametrize("family", WITHOUT)
@pytest.mark.parametrize(("name", "what"), [("described", "tools"), ("call", "tools and tool calls")])
def test_families_whose_template_has_no_tools(family: str, name: str, what: str, tmp_path: Path) -> None:
    able = ", ".join(each.title for each in FAMILIES if each.name in WITH_TOOLS)
    title = by_name(family).title
    message = (
        f"record 0: has {what}, and the chat template of {title} does not support them; use a model whose template"
    )
    with pytest.raises(DataError, match=message) as caught:
        encoder(family).render(sample(tmp_path, {"messages": TALKS[name], "tools": [CLOCK]}), ())
    assert f"({able})" in str(caught.value)
    with pytest.raises(DataError, match="turn 1 has thinking under a key, which this model does not support"):
        encoder(family).render(sample(tmp_path, {"messages": [ASK, {**END, "thinking": "Hm."}]}), ())


def changed(family: str, old: str, new: str) -> Encoder:
    """An encoder whose chat template has this in the place of that."""
    own = pickle.loads(pickle.dumps(encoder(family).tokenizer))
    own.chat_template = str(own.chat_template).replace(old, new)
    return Encoder(by_name(family), own, {"query_num": 4})


def test_the_template_of_the_checkpoint_decides(tmp_path: Path) -> None:
    record = {"messages": TALKS["call"], "tools": [CLOCK]}
    conversation = sample(tmp_path, record)
    named = changed("v4_5", "# Functions", "# Other words")
    assert "# Other words" in str(named.tokenizer.decode(named.render(conversation, ()).input_ids))
    for old, new in (("message.tool_calls or", ""), ("if tools", "if false")):
        with pytest.raises(DataError, match="has tools and tool calls, and the chat template of MiniCPM-V 4.5 does"):
            changed("v4_5", old, new).render(conversation, ())
    with pytest.raises(TemplateMismatchError, match="writes tool descriptions outside of the system turn"):
        changed("v4_5", "{{ '<|im_start|>system\n' }}", "{{ '<|im_start|>tools\n' }}").render(conversation, ())


@pytest.mark.parametrize("family", WITH_TOOLS[1:])
def test_thinking_twice(family: str, tmp_path: Path) -> None:
    twice = turn("assistant", "<think>\na\n</think>\n\nb", reasoning_content="c")
    with pytest.raises(DataError, match="record 0: turn 1 has thinking under a key and in its text"):
        encoder(family).render(sample(tmp_path, {"messages": [ASK, twice]}), ())
