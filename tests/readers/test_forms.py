"""Records of the sharegpt, alpaca and openai forms: what they mean, how they are told apart, what is refused."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from golden_tokenizers import SMALL_IMAGES, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.encoding.encoder import Encoder
from finetune.families import by_name
from finetune.readers import read
from finetune.sample import DataError, Media, Sample, Text
from finetune.templates import turn_order

Record = dict[str, Any]
FILES = ("a.png", "b.png")
TAG = "<image>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    for name, size in zip(FILES, [(40, 30), (90, 20)], strict=True):
        Image.new("RGB", size).save(data / name)
    for name in ("clip.mp4", "sound.mp3"):
        (data / name).write_bytes(b"")
    return data


@cache
def encoder() -> Encoder:
    return Encoder(by_name("llama3_v2_5"), tokenizer("llama3"), SMALL_IMAGES)


def write(folder: Path, *records: Any, name: str = "data.json") -> Path:
    (folder / name).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder / name


def one(folder: Path, record: Any, **options: Any) -> Sample:
    return read(write(folder, record), **options)[0]


def shown(sample: Sample) -> list[tuple[str, str]]:
    """Role and parts of each turn, media as [file name]."""
    return [(message.role, "".join(map(_show, message.parts))) for message in sample.messages]


def _show(part: Text | Media) -> str:
    if isinstance(part, Text):
        return part.text
    assert isinstance(part.data, Path)
    return f"[{part.data.name}]"


def trained(sample: Sample) -> list[int]:
    return [index for index, message in enumerate(sample.messages) if message.train]


# A conversation: system prompt or none, then questions as lists of texts and files, each with an answer.
Asked = list[str]
WORDS = st.text("ab <>\n.\u00e9", min_size=1, max_size=6).filter(lambda text: TAG not in text)
QUESTIONS = st.lists(WORDS | st.sampled_from(FILES), min_size=1, max_size=4).filter(
    lambda pieces: any(piece.strip() and piece not in FILES for piece in pieces)
)
ANSWERS = WORDS.filter(lambda text: bool(text.strip()))
TALKS = st.tuples(st.none() | ANSWERS, st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=3))


def tagged(asked: Asked) -> str:
    return "".join(TAG if piece in FILES else piece for piece in asked)


def turns(
    system: str | None, exchanges: Sequence[tuple[Asked, str]], role: str, content: str, words: str
) -> list[dict]:
    names = words.split()
    lead = [{role: "system", content: system}] if system else []
    pairs = ((names[0], tagged(asked), answer) for asked, answer in exchanges)
    return lead + [t for user, q, a in pairs for t in ({role: user, content: q}, {role: names[1], content: a})]


def forms(system: str | None, exchanges: Sequence[tuple[Asked, str]]) -> dict[str, Record]:
    """The same conversation in every form that can say it, by name; "form, remark"."""
    files = [piece for asked, _ in exchanges for piece in asked if piece in FILES]
    chat = turns(system, exchanges, "role", "content", "user assistant")
    spoken = turns(None, exchanges, "from", "value", "human gpt")
    parts = [
        [{"type": "image_url", "image_url": {"url": p}} if p in FILES else {"type": "text", "text": p} for p in asked]
        for asked, _ in exchanges
    ]
    listed = [
        {**turn, "content": parts[(number - bool(system)) // 2]} if turn["role"] == "user" else turn
        for number, turn in enumerate(chat)
    ]
    history = [[tagged(asked), answer] for asked, answer in exchanges[:-1]]
    last, answer = exchanges[-1]
    return {
        "official": {"image": files, "conversations": chat},
        "sharegpt": {"images": files, "messages": chat},
        "sharegpt, from and value": {"images": files, "conversations": spoken, "system": system or ""},
        "openai": {"messages": listed},
        "openai, tags": {"images": files, "messages": chat},
        "alpaca": {
            "instruction": tagged(last),
            "output": answer,
            "history": history,
            "images": files,
            "system": system,
        },
    }


def joined(sample: Sample) -> list[tuple[str, bool, list[str]]]:
    """Role, training and parts, neighbouring texts as one."""
    result = []
    for message in sample.messages:
        pieces: list[str] = []
        for part in message.parts:
            new = part.text if isinstance(part, Text) else f"file {part.data}"
            if pieces and isinstance(part, Text) and not pieces[-1].startswith("file "):
                pieces[-1] += new
            else:
                pieces.append(new)
        result.append((message.role, message.train, pieces))
    return result


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TALKS)
def test_a_conversation_is_the_same_in_every_form(folder: Path, talk: tuple[str | None, list]) -> None:
    samples = {
        name: one(folder, record, data_format=name.split(",")[0]) for name, record in forms(talk[0], talk[1]).items()
    }
    first = samples["official"]
    expected = encoder().encode(first)
    for name, sample in samples.items():
        assert joined(sample) == joined(first), name
        example = encoder().encode(sample)
        assert example.input_ids.tolist() == expected.input_ids.tolist(), name
        assert example.labels.tolist() == expected.labels.tolist(), name


TALK = (None, [(["a.png", "Who?"], "She."), (["And", "b.png"], "He.")])


@pytest.mark.parametrize(
    ("name", "form", "why"),
    [
        ("official", "official", "'image'"),
        ("sharegpt", "sharegpt", "'images'"),
        ("sharegpt, from and value", "sharegpt", "'images'"),
        ("openai", "openai", "content as a list of parts"),
        ("alpaca", "alpaca", "'instruction'"),
    ],
)
def test_the_form_is_told_from_the_records_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, form: str, why: str
) -> None:
    caplog.set_level(logging.INFO)
    record = forms(*TALK)[name]
    key = next((key for key in ("conversations", "messages") if key in record), None)
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    others = [{key: plain}] if key and "from" not in name else []
    samples = read(write(folder, *others, record))
    assert samples.reading.form.name == form
    assert f"data.json: {len(samples)} records in the {form} format (the records have {why})" in caplog.text
    assert shown(samples[-1])[0] == ("user", "[a.png]Who?")


def test_the_examples_of_the_documentation_are_one_conversation(folder: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (\w+) \| .* \| `(\{.*\})` \|$", text, flags=re.MULTILINE))
    assert list(table) == ["official", "sharegpt", "openai", "alpaca"]
    Image.new("RGB", (8, 8)).save(folder / "1.jpg")
    for form, example in table.items():
        samples = read(write(folder, json.loads(example)))
        assert samples.reading.form.name == form
        assert shown(samples[0]) == [("user", "[1.jpg]Who?"), ("assistant", "Thomas.")]


def test_a_late_record_decides_too(folder: Path) -> None:
    text = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    samples = read(write(folder, *[text] * 100, *[forms(*TALK)["sharegpt"]] * 100))
    assert samples.reading.form.name == "sharegpt"
    assert shown(samples[150])[0] == ("user", "[a.png]Who?")


SPOKEN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_a_system_column_alone_makes_it_sharegpt(folder: Path) -> None:
    assert shown(one(folder, {"conversations": SPOKEN, "system": "Be brief."}))[0] == ("system", "Be brief.")
    assert read(write(folder, {"conversations": SPOKEN})).reading.form.name == "official"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"text": "Hi"}, {"url": "x"}],
            r"the 2 inspected records match no format \(found 'text', 'url'\); official needs",
        ),
        (
            ["Hi"],
            r"match no format \(found no object\); .* alpaca needs 'instruction' and 'output'; openai needs 'messages'",
        ),
        (
            [{"image": "a.png", "conversations": CHAT}, {"images": ["a.png"], "messages": CHAT}],
            r"have 'image' \(official\), 'images' \(sharegpt\), which exclude each other; .*--data_format",
        ),
        (
            [{"instruction": "a", "output": "b"}, {"messages": CHAT}],
            r"'instruction' \(alpaca\), 'messages' \(official\)",
        ),
        ([{"instruction": "a", "chosen": "b", "rejected": "c"}], "'chosen' and 'rejected': preference data"),
        (
            [{"instruction": "a", "output": "b", "image": "a.png"}],
            "alpaca format .* have 'image', .* name it 'images' and put",
        ),
        ([{"messages": CHAT, "kto_tag": True}], "'kto_tag': preference data; --stage dpo trains on pairs"),
    ],
)
def test_records_of_no_form_or_two(folder: Path, records: list, message: str) -> None:
    with pytest.raises(DataError, match=r"data.json: .*" + message):
        read(write(folder, *records))


def test_an_unknown_form(folder: Path) -> None:
    with pytest.raises(ValueError, match="no data_format 'csv'; there are auto, official, sharegpt"):
        read(write(folder, {"messages": CHAT}), data_format="csv")  # pyright: ignore[reportArgumentType]


CALLED = [
    {"from": "human", "value": "Time?"},
    {"from": "function_call", "value": "<tool_call>\n{}\n</tool_call>"},
    {"from": "observation", "value": "12:00"},
    {"from": "gpt", "value": "Noon."},
]


def test_tool_turns(folder: Path) -> None:
    sample = one(folder, {"conversations": CALLED, "tools": "[]"})
    assert [message.role for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert trained(sample) == [1, 3]
    assert trained(one(folder, {"conversations": CALLED}, train_on="last")) == [3]


def test_alpaca_columns(folder: Path) -> None:
    record = {
        "instruction": "Look.",
        "input": "<image>",
        "output": "Red.",
        "images": "a.png",
        "history": [["Hi", "Ho"]],
    }
    sample = one(folder, record)
    assert shown(sample) == [("user", "Hi"), ("assistant", "Ho"), ("user", "Look.\n[a.png]"), ("assistant", "Red.")]
    assert trained(sample) == [1, 3]
    assert shown(one(folder, {"instruction": "", "input": "b", "output": "c"}))[0] == ("user", "b")


def test_loss_of_a_turn(folder: Path) -> None:
    turns = [*CHAT[:1], {**CHAT[1], "loss": 0}, *CHAT]
    assert trained(one(folder, {"messages": turns, "tools": ""}, data_format="sharegpt")) == [3]
    assert trained(one(folder, {"messages": turns}, data_format="openai")) == [3]


@pytest.mark.parametrize(("kind", "file"), [("video", "clip.mp4"), ("audio", "sound.mp3")])
def test_video_and_audio_are_read_and_refused_by_the_encoder(folder: Path, kind: str, file: str) -> None:
    asked = [{"role": "user", "content": f"<{kind}>What?"}, CHAT[1]]
    for record in (
        {"messages": asked, f"{kind}s": [file]},
        {
            "messages": [
                {"role": "user", "content": [{"type": kind, kind: file}, {"type": "text", "text": "What?"}]},
                CHAT[1],
            ]
        },
    ):
        sample = one(folder, record)
        assert sample.messages[0].parts == (Media(kind, folder / file), Text("What?"))  # pyright: ignore[reportArgumentType]
        with pytest.raises(DataError, match=f"takes images and text, no {kind}"):
            encoder().encode(sample)


def data_url(folder: Path) -> str:
    return "data:image/png;base64," + base64.b64encode((folder / "a.png").read_bytes()).decode()


def test_images_inside_records(folder: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": data_url(folder)}}, {"type": "text", "text": "What?"}]
    (media,) = one(folder, {"messages": [{"role": "user", "content": content}, CHAT[1]]}).media()
    assert isinstance(media.data, Image.Image)
    assert media.data.size == (40, 30)


def test_images_inside_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = (folder / "b.png").read_bytes()
    asked = [{"role": "user", "content": "<image><image>Who?"}, CHAT[1]]
    images = [{"bytes": data, "path": None}, {"bytes": None, "path": "a.png"}]
    pq.write_table(pa.Table.from_pylist([{"messages": asked, "images": images}]), folder / "data.parquet")
    first, second = read(folder / "data.parquet")[0].media()
    assert isinstance(first.data, Image.Image)
    assert (first.data.size, second.data) == ((90, 20), folder / "a.png")


def test_csv(folder: Path) -> None:
    import csv

    answer = '{"total": 3}'
    with (folder / "alpaca.csv").open("w", newline="") as file:
        rows = [("instruction", "output", "images", "history")]
        rows += [("<image>Read.", answer, "a.png", '[["a", "b"]]'), ("Hi", "[1]", "", "")]
        csv.writer(file).writerows(rows)
    first, second = read(folder / "alpaca.csv")
    assert shown(first) == [("user", "a"), ("assistant", "b"), ("user", "[a.png]Read."), ("assistant", answer)]
    assert shown(second) == [("user", "Hi"), ("assistant", "[1]")]
    with (folder / "chat.csv").open("w", newline="") as file:
        asked = [{"role": "user", "content": "<image>Hi"}, CHAT[1]]
        csv.writer(file).writerows([("messages", "images"), (json.dumps(asked), '["b.png"]')])
    assert shown(read(folder / "chat.csv")[0]) == [("user", "[b.png]Hi"), ("assistant", "Ho")]


def test_parts_without_a_path_take_the_files_of_the_column(folder: Path) -> None:
    content = [{"type": "text", "text": "Is <image> a tag?"}, {"type": "image"}]
    sample = one(folder, {"messages": [{"role": "user", "content": content}, CHAT[1]], "images": ["b.png"]})
    assert shown(sample)[0] == ("user", "Is <image> a tag?[b.png]")


def asked(text: str, **columns: Any) -> Record:
    return {"messages": [{"role": "user", "content": text}, CHAT[1]], **columns}


def parts(*content: Any) -> Record:
    return {"messages": [{"role": "user", "content": list(content)}, CHAT[1]]}


BAD: list[tuple[str, Any, str]] = [
    (
        "sharegpt",
        asked("<image><image>", images=["a.png"]),
        "2 <image> in the user turns of 'messages', 1 files under 'im",
    ),
    ("sharegpt", asked("Who?", images=["a.png"]), "0 <image> in the user turns of 'messages', 1 files under 'images'"),
    ("sharegpt", asked("<video>"), "1 <video> in the user turns of 'messages', 0 files under 'videos'"),
    (
        "sharegpt",
        {"messages": [CHAT[0], {"role": "assistant", "content": "<image>"}], "images": ["a.png"]},
        r"0 <image> .* \(1 more in other turns, where they are plain text\), 1 files",
    ),
    (
        "sharegpt",
        asked("<image>", images=["gone.png"]),
        "image 'gone.png' does not exist .*correct the path or give --image_ro",
    ),
    ("sharegpt", asked("<image>", images=["https://x.org/a.png"]), "is a URL, and media are not downloaded"),
    ("sharegpt", asked("<image>", images=[3]), "'images' has a number where the path of an image belongs"),
    (
        "sharegpt",
        asked("<image>", images=[["a.png", "b.png"]]),
        "'images' has a list in a list; only videos may be lists",
    ),
    ("sharegpt", asked("<video>", videos=[["a.png", 3]]), "'videos' has a number among the frames of a video"),
    ("sharegpt", {"messages": [{"role": "bot", "content": "a"}]}, "'role' is 'bot', an unknown role; known are .*user"),
    ("sharegpt", {"messages": [{"role": "user"}]}, r"turn 0: 'content' is missing \(found 'role'\)"),
    ("sharegpt", {"messages": [CHAT[0], CHAT[0]]}, "turns 0 and 1 are both user; roles must alternate"),
    ("sharegpt", {"conversation": CHAT}, r"has no 'messages' \(found 'id', 'conversation'\); add the list of turns"),
    ("sharegpt", {"messages": "Hi"}, "'messages' is a string; it must be a list of turns"),
    ("sharegpt", {"messages": CHAT, "system": 3}, "'system' is a number; the system prompt must be a string"),
    ("sharegpt", "Hi", "is a string, not an object with 'messages'"),
    ("openai", parts({"type": "image"}), "ns of 'messages', 0 files|1 parts of type \"image\" without a path"),
    ("openai", parts({"type": "audio_file"}), "a part of type 'audio_file'; known are text, image_url, image, video"),
    ("openai", parts("Hi"), "turn 0 has a string among its parts; parts are objects with 'type'"),
    ("openai", parts({"type": "text"}), "a part of type 'text' without 'text'"),
    ("openai", parts({"type": "image_url", "image_url": {"url": "http://x/a.png"}}), "is a URL"),
    ("openai", parts({"type": "image", "image": "data:image/png;base64,!"}), "not base64"),
    (
        "openai",
        parts({"type": "image", "image": "data:image/png;base64,AAAA"}),
        "an image inside the record .3 bytes. is not an image in a supported format",
    ),
    (
        "openai",
        parts({"type": "video", "video": "data:video/mp4;base64,AAAA"}),
        "a video of 3 bytes inside the record",
    ),
    (
        "openai",
        {"messages": [{"role": "user", "content": None}]},
        "turn 0: 'content' is null; it must be text or a list",
    ),
    ("alpaca", {"instruction": "a", "output": None}, "'output' is null; it must be the answer"),
    ("alpaca", {"output": "b"}, "'instruction' and 'input' for the prompt: empty or missing"),
    ("alpaca", {"instruction": 3, "output": "b"}, "'instruction' is a number; it must be a string"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "'history', entry 0 is .* a pair of strings"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": "c"},
        r"'history' is a string; it must be a list of \[prompt",
    ),
    ("alpaca", {"instruction": "<image>", "output": "b"}, "1 <image> in the user turns of 'instruction', 0 files"),
]


def test_an_alpaca_record_without_an_answer_can_be_asked_not_trained(folder: Path) -> None:
    sample = read(write(folder, {"instruction": "Why?", "ouput": "b"}))[0]
    assert [(message.role, message.text) for message in sample.messages] == [("user", "Why?")]
    assert len(turn_order.turns(sample, ("user", "assistant"), generate=True)) == 1
    with pytest.raises(DataError, match=r"no answer: the last turn \(0\) is user.*'ouput'.*did you mean 'output'"):
        turn_order.turns(sample, ("user", "assistant"), generate=False)


@pytest.mark.parametrize(("form", "record", "message"), BAD)
def test_bad_records(folder: Path, form: Any, record: Any, message: str) -> None:
    record = {"id": "q9", **record} if isinstance(record, dict) else record
    with pytest.raises(DataError, match=r"data.json, record 1( \(id 'q9'\))?: .*(" + message + ")"):
        read(write(folder, record, record), data_format=form)[1]
