import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from golden_tokenizers import tokenizer, vocabulary

from finetune.families import by_name
from finetune.media.slicing import SlicePlan
from finetune.sample import DataError, Media, Message, Part, Sample, Source, Text
from finetune.templates.prompt_types import IGNORE, PromptLayout, TokenizedPrompt

SOURCE = Source("data.json", 3)
NAMES = {"v2_0": "minicpm", "llama3_v2_5": "llama3"}
BOTH = pytest.mark.parametrize("family", NAMES)
IMAGE = Media("image", Text)  # pyright: ignore[reportArgumentType]  # never opened here


def user(*parts: str | Part) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def answer(text: str, train: bool = True) -> Message:
    return Message("assistant", (Text(text),), train=train)


def sample(*messages: Message) -> Sample:
    return Sample(id="x", source=SOURCE, messages=messages)


def render(
    family: str, conversation: Sample, generate: bool = False, plans: tuple[SlicePlan, ...] = ()
) -> TokenizedPrompt:
    return by_name(family).render(conversation, plans, vocabulary(NAMES[family]), PromptLayout(query_num=4), generate)


def labelled(family: str, rendered: TokenizedPrompt) -> list[tuple[str, str]]:
    """(label, input) of every labelled position, as tokens."""
    words = tokenizer(NAMES[family]).convert_ids_to_tokens
    pairs = zip(rendered.labels, rendered.input_ids, strict=True)
    return [(str(words(label)), str(words(number))) for label, number in pairs if label != IGNORE]


def test_v2_0_layout() -> None:
    rendered = render("v2_0", sample(user("Hi"), answer("Two dogs."), user("And cats?"), answer("No.")))
    text = tokenizer("minicpm").decode(rendered.input_ids)
    assert text == "<s> <用户>Hi<AI>Two dogs.<用户>And cats?<AI>No.</s>"
    end = tokenizer("minicpm").eos_token
    got = labelled("v2_0", rendered)
    # The only label that is not the id there: behind an earlier answer the model sees the next user mark.
    assert [pair for pair in got if pair[0] != pair[1]] == [(end, "<")]
    assert [label for label, _ in got] == ["T", "wo", "▁do", "gs", ".", end, "No", ".", end]


def test_llama3_layout() -> None:
    turns = [Message("system", (Text(" Be brief. "),)), user("\n Hi \n"), answer(" Two. "), user("So?"), answer("No.")]
    rendered = render("llama3_v2_5", sample(*turns))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
    assert tokenizer("llama3").decode(rendered.input_ids) == "<|begin_of_text|>" + "".join(
        (header("system", "Be brief."), header("user", "Hi"), header("assistant", "Two."), header("user", "So?"))
    ) + header("assistant", "No.")
    got = labelled("llama3_v2_5", rendered)
    assert all(label == number for label, number in got)
    assert "".join(label for label, _ in got) == "Two.<|eot_id|>No.<|eot_id|>"


@BOTH
def test_training_is_prompt_answer_end(family: str) -> None:
    conversation = sample(user("Hi"), answer("Two."), user("And?"), answer("<box>(1,2)</box> <unk> cats."))
    prompt = render(family, conversation, generate=True)
    trained = render(family, conversation)
    reply = vocabulary(NAMES[family]).continuation("<box>(1,2)</box> <unk> cats.")
    end = vocabulary(NAMES[family]).control(by_name(family).stop_tokens[0])
    assert trained.input_ids == [*prompt.input_ids, *reply, end]
    assert trained.labels[len(prompt.input_ids) :] == [*reply, end]
    assert set(prompt.labels) == {IGNORE}
    without = sample(*conversation.messages[:-1])
    assert render(family, without, generate=True) == prompt


@BOTH
def test_untrained_answers_have_no_label(family: str) -> None:
    full = render(family, sample(user("a"), answer("One."), user("b"), answer("Two.")))
    last = render(family, sample(user("a"), answer("One.", train=False), user("b"), answer("Two.")))
    first = render(family, sample(user("a"), answer("One."), user("b"), answer("Two.", train=False)))
    assert full.input_ids == last.input_ids == first.input_ids
    count = {name: len(labelled(family, each)) for name, each in (("full", full), ("first", first), ("last", last))}
    assert count["full"] == count["first"] + count["last"]
    assert min(count.values()) >= 3
    merged = [a if a != IGNORE else b for a, b in zip(first.labels, last.labels, strict=True)]
    assert merged == full.labels


@BOTH
def test_labels_of_random_conversations(family: str) -> None:
    """Earlier answers are found whatever they are made of: marks, spaces, newlines, byte pieces, turn marks."""
    chance = random.Random(0)
    words = [" ", "\n", "dogs", "<AI>", "<用户>", "☃", "</box>", "<box>", "<ref>", "<unk>", "</s>", ".", "用户", "A"]
    decode = tokenizer(NAMES[family]).decode
    for _ in range(60):
        texts = ["".join(chance.choices(words, k=6)) + "x" for _ in range(6)]
        turns = [user(text) if turn % 2 == 0 else answer("y" + text) for turn, text in enumerate(texts)]
        rendered = render(family, sample(*turns))
        end = vocabulary(NAMES[family]).control(by_name(family).stop_tokens[0])
        groups: list[list[int]] = [[]]
        for label in rendered.labels:
            if label == end:
                groups.append([])
            elif label != IGNORE:
                groups[-1].append(label)
        assert groups.pop() == []
        found = ["".join(str(decode(group)).split()) for group in groups]
        assert found == ["".join(("y" + text).split()) for text in texts[1::2]]


def test_v2_0_label_where_a_token_spans_the_border() -> None:
    """A token that is half answer, half user mark has no loss, and no end token is taught in its place."""

    class Fused:
        def __getattr__(self, name: str) -> object:
            return getattr(vocabulary("minicpm"), name)

        def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
            at = text.find(".<") + 1 or len(text)
            ranges = [(n, n + 1) for n in range(at - 1)]
            ranges += [(at - 1, at + 1)] + [(n, n + 1) for n in range(at + 1, len(text))]
            return [500 + first for first, _ in ranges], ranges

    conversation = sample(user("Hi"), answer("Yes."), user("b"), answer("No"))
    rendered = by_name("v2_0").render(conversation, (), Fused(), PromptLayout(), False)  # pyright: ignore[reportArgumentType]
    start = 1 + len("<用户>Hi<AI>")
    expected = [IGNORE] * start + rendered.input_ids[start : start + 3]
    tail = len(vocabulary("minicpm").continuation("No")) + 1
    assert rendered.labels[:-tail] == expected + [IGNORE] * (len(rendered.labels) - tail - len(expected))
    assert rendered.labels[-tail:] == rendered.input_ids[-tail:]


@BOTH
def test_placeholders_and_bounds(family: str) -> None:
    plans = (SlicePlan((448, 448)), SlicePlan((448, 448), (2, 2), (896, 896), (448, 448)))
    conversation = sample(user("a", IMAGE, "b"), answer("c"), user(IMAGE, "\nd"), answer("e"))
    rendered = render(family, conversation, plans=plans)
    words = vocabulary(NAMES[family])
    unknown = words.control("<unk>")
    assert len(rendered.image_bounds) == 1 + 5
    for first, last in rendered.image_bounds:
        assert rendered.input_ids[first:last] == [unknown] * 4
        assert rendered.input_ids[first - 1] == words.control("<image>")
        assert rendered.input_ids[last] == words.control("</image>")
    assert rendered.input_ids.count(unknown) == 6 * 4
    between = [right[0] - left[1] for left, right in pairwise(rendered.image_bounds[1:])]
    # </image><slice><image>, a pair in a row, a newline between the rows.
    assert between == [3, 2, 2 + len(words.text("\n")), 2]
    starts = [index for index, number in enumerate(rendered.input_ids) if number == words.control("<slice>")]
    assert len(starts) == 1


def test_llama3_trims_around_images_only_at_the_edges() -> None:
    plans = (SlicePlan((448, 448)), SlicePlan((448, 448)))
    one = render("llama3_v2_5", sample(user(" \n", IMAGE, "\na ", IMAGE, "\n"), answer("b")), plans=plans)
    text = str(tokenizer("llama3").decode(one.input_ids)).replace("<unk>" * 4, "?")
    assert "\n\n<image>?</image>\na <image>?</image><|eot_id|>" in text


REFUSED: list[tuple[str, Callable[[], Sample], bool, str]] = [
    (
        "v2_0",
        lambda: sample(Message("system", (Text("s"),)), user("a"), answer("b")),
        False,
        "turn 0 has role 'system'",
    ),
    ("v2_0", lambda: sample(answer("b"), user("a"), answer("b")), False, "turn 0 is assistant, it must be user"),
    ("llama3_v2_5", lambda: sample(answer("b"), user("a"), answer("c")), False, "turn 0 is assistant, it must be user"),
    ("llama3_v2_5", lambda: sample(Message("system", (Text("s"),))), True, "turn 1 is missing, it must be user"),
    ("llama3_v2_5", lambda: sample(user("a"), Message("tool", (Text("s"),))), True, "turn 1 has role 'tool'"),
    ("v2_0", lambda: sample(user("a")), False, r"no answer: the last turn \(0\) is user"),
    ("llama3_v2_5", lambda: sample(user("a"), answer(" \n")), False, "turn 1: the answer is empty"),
    ("v2_0", lambda: sample(user("a"), Message("assistant", (IMAGE,))), False, r"turn 1 \(assistant\) contains image"),
]


@pytest.mark.parametrize(("family", "make", "generate", "message"), REFUSED)
def test_refused(family: str, make: Callable[[], Sample], generate: bool, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        render(family, make(), generate)
