"""Prompts of 2.6, o-2.6, 4.0, 4.5 and o-4.5 over the tokenizers of the tiny checkpoints."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chatml_samples import CHATML, CUT, IMAGE, THINKING, WHOLE, encoder, render, talk, text, trained, turn
from golden_tokenizers import tokenizer, written
from PIL import Image

from finetune.encoding.encoder import Encoder
from finetune.families import by_name
from finetune.readers import read
from finetune.sample import DataError, Message, Sample, Text
from finetune.templates.prompt_types import IGNORE

ALL = pytest.mark.parametrize("family", CHATML)
WITH_THINKING = pytest.mark.parametrize("family", THINKING)
HEAD = {
    "v2_6": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    "o2_6": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
    "v4_0": "<s>",
    "v4_5": "",
    "o4_5": "",
}
NO_THOUGHT = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nI count.\n</think>\n\n"


def block(family: str) -> str:
    """What stands in front of the last answer."""
    return NO_THOUGHT if family in THINKING else ""


def user(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n"


def answer(content: str) -> str:
    return f"<|im_start|>assistant\n{content}<|im_end|>\n"


@ALL
def test_layout(family: str) -> None:
    rendered = render(family, talk(" Hi \n", "Two dogs.", "And cats?", "No."))
    body = user(" Hi \n") + answer("Two dogs.") + user("And cats?") + answer(block(family) + "No.")
    assert text(family, rendered) == HEAD[family] + body
    assert trained(family, rendered) == ["Two dogs.<|im_end|>", "No.<|im_end|>"]


@ALL
def test_system_turn(family: str) -> None:
    rendered = render(family, talk(turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b")))
    bos = HEAD[family] if family == "v4_0" else ""
    body = "<|im_start|>system\nBe brief.<|im_end|>\n" + user("a") + answer(block(family) + "b")
    assert text(family, rendered) == bos + body
    assert trained(family, rendered) == ["b<|im_end|>"]


@ALL
@pytest.mark.parametrize("reply", ["Two.", "<box>(1,2)</box> <unk> cats.", " two\nlines \n", "你好"])
def test_training_is_prompt_answer_end(family: str, reply: str) -> None:
    conversation = talk("Hi", "One.", "And?", reply)
    prompt = render(family, conversation, generate=True)
    full = render(family, conversation)
    words = encoder(family).prompt_tokenizer
    ids, end = words.continuation(reply), words.control("<|im_end|>")
    assert full.input_ids == [*prompt.input_ids, *ids, end, *words.fixed("\n")]
    after = full.labels[len(prompt.input_ids) :]
    assert after == [*ids, end, *[IGNORE] * len(words.fixed("\n"))]
    assert set(prompt.labels) == {IGNORE}
    assert render(family, talk("Hi", "One.", "And?"), generate=True) == prompt


def official(family: str, turns: list[dict[str, str]], thinking: bool | None = False) -> list[int]:
    """Ids of the prompt by chat template and tokenizer."""
    options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    prompt = written(family).apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    return written(family)(str(prompt))["input_ids"]


@ALL
def test_prompt_is_what_the_chat_template_and_the_tokenizer_give(family: str) -> None:
    """Also where line breaks of the template and of the text meet."""
    chance = random.Random(0)
    words = ["\n", " ", "dogs", ".", "\n\n", "你", "  ", "!", "<box>", "assistant", "user"]
    for _ in range(40):
        texts = ["".join(chance.choices(words, k=5)) for _ in range(3)]
        texts[1] = texts[1].strip() + "x"
        turns = [
            {"role": role, "content": each} for role, each in zip(("user", "assistant", "user"), texts, strict=True)
        ]
        assert render(family, talk(*texts), generate=True).input_ids == official(family, turns), texts


@ALL
def test_placeholders_and_bounds(family: str) -> None:
    rendered = render(family, talk(turn("user", "a", IMAGE, "b"), "c", turn("user", IMAGE, "\nd"), "e"), WHOLE, CUT)
    cut = "<slice>?</slice>"
    second = f"<image_id>1</image_id><image>?</image>{cut}{cut}\n{cut}{cut}\nd"
    body = user("a<image_id>0</image_id><image>?</image>b") + answer("c") + user(second) + answer(block(family) + "e")
    assert text(family, rendered) == HEAD[family] + body
    words = encoder(family).prompt_tokenizer
    names = ["image", "image", *["slice"] * 4]
    for (first, last), name in zip(rendered.image_bounds, names, strict=True):
        assert rendered.input_ids[first:last] == [words.control("<unk>")] * 4
        assert rendered.input_ids[first - 1] == words.control(f"<{name}>")
        assert rendered.input_ids[last] == words.control(f"</{name}>")
    between = [right[0] - left[1] for left, right in pairwise(rendered.image_bounds[1:])]
    assert between == [2, 2, 2 + len(words.text("\n")), 2]


@ALL
def test_every_way_to_name_images_gives_the_same_ids(family: str, tmp_path: Path) -> None:
    for name, size in (("a.png", (60, 50)), ("b.png", (900, 460))):
        Image.new("RGB", size).save(tmp_path / name)

    def record(image: Any, first: str, second: str) -> dict[str, Any]:
        question, last = f"Compare {first} and\n{second}.", {"role": "assistant", "content": "Same."}
        return {"image": image, "conversations": [{"role": "user", "content": question}, last]}

    records = [
        record(["a.png", "b.png"], "<image>", "<image>"),
        record({"<image_00>": "a.png", "<image_01>": "b.png"}, "<image_00>", "<image_01>"),
        record({"<image_3>": "b.png", "<image_12>": "a.png"}, "<image_12>", "<image_3>"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    examples = [encoder(family).encode(each) for each in read(tmp_path / "data.json")]
    first = examples[0]
    assert len(first.image_bound) == 1 + 1 + 2
    assert "<image_id>1</image_id>" in written(family).decode(first.input_ids)
    for other in examples[1:]:
        for key in ("input_ids", "labels", "image_bound", "tgt_sizes", "patches"):
            assert getattr(other, key).tolist() == getattr(first, key).tolist()


@ALL
def test_without_numbers(family: str) -> None:
    chosen = encoder(family)
    plain = type(chosen)(chosen.family, chosen.tokenizer, {"query_num": 4, "use_image_id": False})
    assert "<image_id>" not in text(family, plain.render(talk(turn("user", IMAGE), "b"), (WHOLE,)))


def small(family: str) -> Encoder:
    """An encoder of any family over a small tokenizer."""
    if family in CHATML:
        return encoder(family)
    recorded = tokenizer({"v2_0": "minicpm", "llama3_v2_5": "llama3"}[family])
    return Encoder(by_name(family), recorded, {"query_num": 4})


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5", *CHATML])
@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("losses", [(1, 1), (0, 1), (1, 0)])
def test_which_tokens_carry_loss(family: str, train_on: Any, losses: tuple[int, int], tmp_path: Path) -> None:
    """Answers and the tokens that end them, of every family; nothing else."""
    pairs = zip(("user", "assistant") * 2, "abcd", strict=True)
    turns: list[dict[str, Any]] = [{"role": role, "content": each} for role, each in pairs]
    for at, loss in zip((1, 3), losses, strict=True):
        turns[at] |= {"content": f"Answer {at}", "loss": loss}
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}]))
    sample = read(tmp_path / "data.json", train_on=train_on)[0]
    chosen = small(family)
    labels = [label for label in chosen.render(sample, ()).labels if label != IGNORE]
    end = chosen.prompt_tokenizer.control(chosen.family.stop_tokens[0])
    wanted = [("Answer 1", train_on == "all" and losses[0]), ("Answer 3", losses[1])]
    text = chosen.prompt_tokenizer.continuation
    assert labels == [number for each, on in wanted if on for number in (*text(each), end)]


@WITH_THINKING
@pytest.mark.parametrize(
    ("thinking", "shown", "labelled"),
    [
        ("keep", THOUGHT, f"{THOUGHT}Two.<|im_end|>"),
        ("mask", THOUGHT, "Two.<|im_end|>"),
        ("strip", NO_THOUGHT, "Two.<|im_end|>"),
    ],
)
def test_thinking_of_the_last_answer(family: str, thinking: Any, shown: str, labelled: str) -> None:
    for reply in (f"{THOUGHT}Two.", "<think>I count.</think>Two.", "\nI count.\n</think>\n\nTwo."):
        rendered = render(family, talk("How many?", reply), thinking=thinking)
        assert text(family, rendered) == user("How many?") + answer(f"{shown}Two.")
        assert trained(family, rendered) == [labelled]


@WITH_THINKING
@pytest.mark.parametrize("thinking", ["keep", "mask", "strip"])
def test_an_empty_thought_has_no_loss(family: str, thinking: Any) -> None:
    for reply in ("Two.", f"{NO_THOUGHT}Two.", "\n\nTwo.", "<think></think>Two."):
        rendered = render(family, talk("How many?", reply), thinking=thinking)
        assert text(family, rendered) == user("How many?") + answer(f"{NO_THOUGHT}Two.")
        assert trained(family, rendered) == ["Two.<|im_end|>"]


@WITH_THINKING
def test_thinking_of_earlier_answers_is_left_out(family: str) -> None:
    rendered = render(family, talk("How many?", f"{THOUGHT}Two.", "And cats?", "No."))
    body = user("How many?") + answer("Two.") + user("And cats?") + answer(f"{NO_THOUGHT}No.")
    assert text(family, rendered) == body
    assert trained(family, rendered) == ["Two.<|im_end|>", "No.<|im_end|>"]


@WITH_THINKING
def test_the_prompt_asks_for_thinking_or_not(family: str) -> None:
    opening = {False: NO_THOUGHT, None: "", True: "<think>\n" if family == "v4_5" else ""}
    for asked, written_opening in opening.items():
        rendered = render(family, talk("How many?"), generate=True, enable_thinking=asked)
        assert text(family, rendered) == user("How many?") + "<|im_start|>assistant\n" + written_opening
        # What is trained goes on where this prompt ends.
        reply = "Two." if asked is False else f"{THOUGHT}Two."
        full = render(family, talk("How many?", reply)).input_ids
        assert full[: len(rendered.input_ids)] == rendered.input_ids


@pytest.mark.parametrize("family", ["v2_6", "o2_6", "v4_0"])
def test_families_without_thinking_leave_the_text(family: str) -> None:
    rendered = render(family, talk("How many?", f"{THOUGHT}Two."))
    assert text(family, rendered).endswith(answer(f"{THOUGHT}Two."))
    assert trained(family, rendered) == [f"{THOUGHT}Two.<|im_end|>"]


CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def tools(*between: Message) -> Sample:
    return talk(turn("user", "What time?"), turn("assistant", CALL), *between, turn("assistant", "Noon."))


def wrapped(*results: str) -> str:
    return (
        "<|im_start|>user"
        + "".join(f"\n<tool_response>\n{each}\n</tool_response>" for each in results)
        + "<|im_end|>\n"
    )


@WITH_THINKING
def test_tools(family: str) -> None:
    rendered = render(family, tools(turn("tool", "12:00"), turn("tool", "UTC")))
    body = user("What time?") + answer(CALL) + wrapped("12:00", "UTC") + answer(f"{NO_THOUGHT}Noon.")
    assert text(family, rendered) == body
    assert trained(family, rendered) == [f"{CALL}<|im_end|>", "Noon.<|im_end|>"]
    assert written(family).convert_tokens_to_ids("<tool_call>") in rendered.input_ids


@WITH_THINKING
def test_a_thought_before_a_tool_call_stays(family: str) -> None:
    """Until the next question, whether the result comes from a tool turn or wrapped in a user turn."""
    thoughtful = turn("assistant", f"{THOUGHT}{CALL}")
    for result in (turn("tool", "12:00"), turn("user", "<tool_response>\n12:00\n</tool_response>")):
        rendered = render(family, talk(turn("user", "What time?"), thoughtful, result, turn("assistant", "Noon.")))
        body = user("What time?") + answer(f"{THOUGHT}{CALL}") + wrapped("12:00") + answer(f"{NO_THOUGHT}Noon.")
        assert text(family, rendered) == body
        assert trained(family, rendered)[0] == f"{THOUGHT}{CALL}<|im_end|>"
    later = talk(turn("user", "a"), thoughtful, turn("tool", "b"), turn("assistant", "c"), turn("user", "d"))
    assert "<think>" not in text(family, render(family, later, generate=True, enable_thinking=None))


@WITH_THINKING
def test_the_chat_template_agrees_on_tools_and_history(family: str) -> None:
    asked = [("user", "a"), ("assistant", f"{THOUGHT}{CALL}"), ("tool", "b"), ("tool", "c")]
    asked = [*asked, ("assistant", "d"), ("user", "e")]
    turns = [{"role": role, "content": content} for role, content in asked]
    for thinking in (None, False, True):
        sample = talk(*(turn(role, content) for role, content in asked))
        ours = render(family, sample, generate=True, enable_thinking=thinking)
        assert ours.input_ids == official(family, turns, thinking)


REFUSED: list[tuple[str, Sample, str]] = [
    ("v2_6", tools(turn("tool", "x")), "turn 2 has role 'tool', this model's prompt has system, user, assistant"),
    ("v4_5", talk("a", "<think>\nand then"), "turn 1: <think> is not closed; add </think> after the thinking"),
    ("v4_5", talk("a", THOUGHT), "turn 1: no answer after </think>; add it"),
    ("o4_5", talk("a", THOUGHT, "b", "c"), "turn 1: no answer after </think>"),
    ("v4_0", talk("a", "b", "c"), r"no answer: the last turn \(2\) is user"),
]


@pytest.mark.parametrize(("family", "sample", "message"), REFUSED)
def test_refused(family: str, sample: Sample, message: str) -> None:
    with pytest.raises(DataError, match=f"^data.json, record 3: {message}"):
        render(family, sample)


@WITH_THINKING
def test_thinking_that_is_not_trained_is_not_judged(family: str) -> None:
    sample = talk("a", Message("assistant", (Text("<think>\nand then"),)), "b", "c")
    assert trained(family, render(family, sample)) == ["c<|im_end|>"]
