"""Places of media as other tools write them: read where their meaning is sure, otherwise text with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.readers import read
from finetune.sample import DataError, Sample, Text

FEW = "their number differs from the number of remaining files"
FORMS = ("official", "sharegpt", "openai", "alpaca")
MANY = {"image": "images", "video": "videos", "audio": "audios"}
PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    for name in ("a.png", "b b.png", "c(1).png"):
        Image.new("RGB", (8, 8)).save(data / name)
    for name in ("a.mp4", "a.wav"):
        (data / name).touch()
    return data


def record(form: str, question: str, answer: str = "A dog.", /, **files: Any) -> dict[str, Any]:
    """The same exchange in one of the forms; ``files`` by kind."""
    if form == "alpaca":
        turns: dict[str, Any] = {"instruction": question, "output": answer}
    else:
        content = [{"type": "text", "text": question}] if form == "openai" else question
        turns = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
    return turns | {kind if form == "official" else MANY[kind]: paths for kind, paths in files.items()}


def one(folder: Path, record: dict[str, Any], form: Any) -> Sample:
    (folder / "data.json").write_text(json.dumps([record]))
    return read(folder / "data.json", data_format=form)[0]


def shown(sample: Sample, turn: int = 0) -> str:
    parts = sample.messages[turn].parts
    return "".join(part.text if isinstance(part, Text) else f"[{part.kind} {name(part.data)}]" for part in parts)


def name(data: Any) -> str:
    return data.name if isinstance(data, Path) else "inside"


BARE = {
    "image": (
        "(<image>./</image>)",
        "<image>./</image>",
        "<Image>",
        "<IMAGE>",
        "<image/>",
        "<image />",
        "<img>",
        "<img/>",
        "<img></img>",
        "<ImageHere>",
        "<image_pad>",
        "<image_placeholder>",
        "<image_soft_token>",
        "<start_of_image>",
        "<|image|>",
        "<|image_pad|>",
        "<|image_1|>",
        "<image 1>",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>",
        "<|begin_of_image|><|image|><|end_of_image|>",
        "<img><IMG_CONTEXT><IMG_CONTEXT></img>",
        "<im_start><image><im_end>",
        "[IMG]",
        "[image 1]",
    ),
    "video": (
        "(<video>./</video>)",
        "<Video>",
        "<video/>",
        "<VideoHere>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    ),
    "audio": (
        "(<audio>./</audio>)",
        "<Audio>",
        "<speech>",
        "<SpeechHere>",
        "<|AUDIO|>",
        "<|audio_bos|><|AUDIO|><|audio_eos|>",
        "<|audio_1|>",
    ),
}
FILE = {"image": "a.png", "video": "a.mp4", "audio": "a.wav"}


@pytest.mark.parametrize(("kind", "mark"), [(kind, mark) for kind, marks in BARE.items() for mark in marks])
@pytest.mark.parametrize("form", FORMS)
def test_as_many_places_as_files(folder: Path, form: str, kind: str, mark: str) -> None:
    """The place is read, in front of the question, behind it or in its middle, and nothing of the mark stays."""
    sample = one(folder, record(form, f"See {mark} here?", **{kind: [FILE[kind]]}), form)
    assert shown(sample) == f"See [{kind} {FILE[kind]}] here?"
    assert sample.notes == ()


@pytest.mark.parametrize("form", FORMS[1:])
def test_numbered_tags_of_the_official_form_in_the_others(folder: Path, form: str) -> None:
    sample = one(folder, record(form, "<image_0>, <image_1>?", image=["a.png", "b b.png"]), form)
    assert shown(sample) == "[image a.png], [image b b.png]?"


@pytest.mark.parametrize(
    ("question", "images", "wanted"),
    [
        ("Picture 1: <img>a.png</img>\nWhat?", [], "Picture 1: [image a.png]\nWhat?"),
        ("<img src='a.png' width=3>What?", [], "[image a.png]What?"),
        ('<img class="x" src="b b.png"/>What?', [], "[image b b.png]What?"),
        ("<img src=a.png>What?", [], "[image a.png]What?"),
        ("![](a.png) and ![two](b%20b.png)", [], "[image a.png] and [image b b.png]"),
        ('![x](a.png "a title")![](c(1).png)![](<b b.png>)', [], "[image a.png][image c(1).png][image b b.png]"),
        ("[img]a.png[/img]<image>b b.png</image>", [], "[image a.png][image b b.png]"),
        (f"![]({PNG})What?", [], "[image inside]What?"),
        # What the record lists as well has one place, not two.
        ("<img>a.png</img>What?", ["a.png"], "[image a.png]What?"),
        ("<img>b b.png</img>, <img>a.png</img>?", ["a.png", "b b.png"], "[image b b.png], [image a.png]?"),
        ("<image> or ![](b%20b.png)?", ["a.png"], "[image a.png] or [image b b.png]?"),
        ("<Image> or ![](b%20b.png)?", ["a.png"], "[image a.png] or [image b b.png]?"),
        ("<image><Image>", ["a.png", "b b.png"], "[image a.png][image b b.png]"),
        ("<|image_1|> <|image_2|>", ["a.png", "b b.png"], "[image a.png] [image b b.png]"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_files_named_in_the_text(folder: Path, form: str, question: str, images: list[str], wanted: str) -> None:
    sample = one(folder, record(form, question, image=images) if images else record(form, question), form)
    assert shown(sample) == wanted
    assert sample.notes == ()


def test_videos_and_sound_named_in_the_text(folder: Path) -> None:
    question = "Audio 1: <audio>a.wav</audio>\n<video src='a.mp4'></video>What?"
    assert shown(one(folder, record("sharegpt", question), "auto")) == "Audio 1: [audio a.wav]\n[video a.mp4]What?"


@pytest.mark.parametrize(
    ("question", "note"),
    [
        ("<img>gone.png</img>", "no such file exists: <img>PATH</img>"),
        ('<img src="https://a.org/a.png">', "no such file exists: <img src=PATH>"),
        ("![](https://a.org/a.png)", "no such file exists: ![](PATH)"),
        ("<Image> or <Image>", f"{FEW}: <Image>"),
        ("<|image_2|><|image_2|>", f"{FEW}: <|image_N|>"),
        ("<|image_pad|>", f"{FEW}: <|image_pad|>"),
        ("<|AUDIO|>", f"{FEW}: <|AUDIO|>"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_sure_stays_text(folder: Path, form: str, question: str, note: str) -> None:
    sample = one(folder, record(form, question), form)
    assert shown(sample) == question
    assert sample.notes == (f"media placeholders kept as text in a user turn, since {note}",)


def test_as_many_but_in_another_order(folder: Path) -> None:
    sample = one(folder, record("official", "<image 2> <image 1>", image=["a.png", "b b.png"]), "official")
    assert shown(sample) == "[image a.png]\n[image b b.png]\n<image 2> <image 1>"
    assert [note.rpartition(": ")[2] for note in sample.notes] == ["<image N>"]


def test_beside_tags_of_our_own(folder: Path) -> None:
    """Every file has its tag: another spelling is no place, and is told."""
    sample = one(folder, record("sharegpt", "<image> with [IMG]?", image=["a.png"]), "auto")
    assert shown(sample) == "[image a.png] with [IMG]?"
    assert len(sample.notes) == 1


@pytest.mark.parametrize("form", FORMS)
def test_named_files_beside_files_without_a_place(folder: Path, form: str) -> None:
    with pytest.raises(
        DataError, match="1 image files are named in the text, and beside them there are 0 <image> for 1"
    ):
        one(folder, record(form, "![](b%20b.png)", image=["a.png"]), form)


@pytest.mark.parametrize(
    "mark", ["<image>", "(<image>./</image>)", "<|image_pad|>", "<|image_1|>", "<|AUDIO|>", "<video>"]
)
@pytest.mark.parametrize("form", FORMS)
def test_marks_in_answers(folder: Path, form: str, mark: str) -> None:
    sample = one(folder, record(form, "What?", f"See {mark}"), form)
    assert shown(sample, 1) == f"See {mark}"
    spelling = mark.replace("_1", "_N")
    assert sample.notes == (
        f"media placeholders kept as text in an answer, since only user turns have media: {spelling}",
    )


@pytest.mark.parametrize(
    "answer",
    [
        "<img src='a.png'>",
        "<img>",
        "![](a.png)",
        "<video>\n<source src='a.mp4'></video>",
        "<image><url>a.png</url></image>",
        "<img>a.png</img>",
        "See [image].",
        "<p>image</p>",
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_html_and_markdown_in_answers_are_text(folder: Path, form: str, answer: str) -> None:
    sample = one(folder, record(form, "What?", answer), form)
    assert shown(sample, 1) == answer
    assert sample.notes == ()


def test_tags_beside_parts(folder: Path) -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]
    sample = one(folder, {"messages": turns}, "auto")
    assert shown(sample) == "[image a.png]<image>What?"
    assert [note.partition("since ")[2] for note in sample.notes] == ["media are parts of the content: <image>"]


def test_no_file_outside_of_the_allowed_places(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([record("official", f"<img>{folder / 'a.png'}</img>")]))
    with pytest.raises(DataError, match="--strict_paths"):
        read(tmp_path / "data.json", strict_paths=True)[0]
