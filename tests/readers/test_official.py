import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.readers import read
from finetune.sample import DataError, Media, Sample, Text

QUESTION = {"role": "user", "content": "<image>\nWhat?"}
ANSWER = {"role": "assistant", "content": "A dog."}
TURNS = [QUESTION, ANSWER]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a.png and b.png; the current directory is another, empty one."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(data / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return data


def write(folder: Path, *records: Any) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def one(folder: Path, record: Any, **options: Any) -> Sample:
    return read(write(folder, record), **options)[0]


def shown(sample: Sample) -> list[tuple[str, str]]:
    """Role and parts of each turn, media as [file name]."""
    return [(message.role, "".join(_show(part) for part in message.parts)) for message in sample.messages]


def _show(part: Text | Media) -> str:
    if isinstance(part, Text):
        return part.text
    assert isinstance(part.data, Path)
    return f"[{part.data.name}]"


def test_single_image_in_place(folder: Path) -> None:
    sample = one(folder, {"id": "q1", "image": "a.png", "conversations": TURNS})
    assert (sample.id, str(sample.source)) == ("q1", f"{folder / 'train.json'}, record 0 (id 'q1')")
    assert shown(sample) == [("user", "[a.png]\nWhat?"), ("assistant", "A dog.")]
    assert [message.train for message in sample.messages] == [False, True]
    assert sample.messages[0].parts == (Media("image", folder / "a.png"), Text("\nWhat?"))


@pytest.mark.parametrize("image", ["a.png", ["a.png"], {"<image>": "a.png"}])
def test_in_front_without_a_tag(folder: Path, image: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}, ANSWER]
    sample = one(folder, {"image": image, "conversations": turns})
    assert shown(sample)[:2] == [("system", "Be brief."), ("user", "[a.png]\nWhat?")]
    assert sample.id == "0"


def test_several_in_front(folder: Path) -> None:
    sample = one(folder, {"image": ["b.png", "a.png"], "conversations": [{"role": "user", "content": "Both?"}, ANSWER]})
    assert shown(sample)[0] == ("user", "[b.png]\n[a.png]\nBoth?")


@pytest.mark.parametrize(
    ("image", "tags"),
    [("a.png", ["<image>"]), (["a.png"], ["<image>"]), ({"<image_00>": "a.png"}, ["<image_00>"])]
    + [
        (["a.png", "b.png"], ["<image>"] * 2),
        ({"<image_07>": "b.png", "<image_1>": "a.png"}, ["<image_1>", "<image_07>"]),
    ],
)
def test_every_form_gives_the_same_parts(folder: Path, image: Any, tags: Sequence[str]) -> None:
    turns = [{"role": "user", "content": f"Look {tags[0]} here."}, ANSWER]
    turns += [{"role": "user", "content": f"\n{tags[1]}and"}, ANSWER] if len(tags) > 1 else []
    got = shown(one(folder, {"image": image, "conversations": turns}))
    assert got[0] == ("user", "Look [a.png] here.")
    assert len(tags) == 1 or got[2] == ("user", "\n[b.png]and")


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": []}, {"image": {}}])
def test_text_only(folder: Path, image: dict[str, Any]) -> None:
    sample = one(folder, {**image, "conversations": [{"role": "user", "content": "Hi <images>"}, ANSWER]})
    assert shown(sample) == [("user", "Hi <images>"), ("assistant", "A dog.")]


def test_a_tag_in_an_answer_is_text(folder: Path) -> None:
    turns = [QUESTION, {"role": "assistant", "content": "Write <image> or <image_00>."}]
    assert shown(one(folder, {"image": "a.png", "conversations": turns}))[1][1] == "Write <image> or <image_00>."


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_sharegpt_names(folder: Path, key: str) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    assert shown(one(folder, {key: turns})) == [("system", "s"), ("user", "u"), ("assistant", "a")]


def test_places_in_order(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    record = {"image": "c.png", "conversations": TURNS}
    for place in (Path.cwd(), root, folder):
        Image.new("RGB", (8, 8)).save(place / "c.png")
        found = next(one(folder, record, image_root=root).media()).data
        assert found == place / "c.png"
    assert next(one(folder, {**record, "image": str(root / "c.png")}).media()).data == root / "c.png"


def test_a_later_change_of_directory_moves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, {"image": "c.png", "conversations": TURNS})
    Image.new("RGB", (8, 8)).save("c.png")
    here = Path.cwd()
    samples = read(f"../data/{path.name}")
    monkeypatch.chdir(folder)
    assert next(samples[0].media()).data == here / "c.png"


def test_samples_are_built_on_access_and_images_never_opened(folder: Path) -> None:
    (folder / "broken.png").write_text("no image")
    bad = {"conversations": "nonsense"}
    samples = read(write(folder, bad, {"image": "broken.png", "conversations": TURNS}, bad))
    assert len(samples) == 3
    assert next(samples[1].media()).data == folder / "broken.png"
    assert samples[-2].id == samples[1:2][0].id == "1"
    for index in (0, 2, -1):
        with pytest.raises(DataError, match=f"record {index % 3}: 'conversations' is a string"):
            samples[index]
    with pytest.raises(IndexError):
        samples[3]


TWO = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2


def with_loss(*values: Any) -> list[dict[str, Any]]:
    """Two exchanges with this ``loss`` in each turn, None for none."""
    pairs = zip(TWO, values, strict=True)
    return [turn if value is None else {**turn, "loss": value} for turn, value in pairs]


@pytest.mark.parametrize(
    ("losses", "train_on", "trained"),
    [
        ((None, None, None, None), "all", [1, 3]),
        ((None, None, None, None), "last", [3]),
        ((None, 0, None, None), "all", [3]),
        ((0, 1, 0, 1), "all", [1, 3]),
        ((None, True, None, False), "all", [1]),
        ((None, 1, None, 1), "last", [3]),
        ((None, 1, None, 0), "last", []),
    ],
)
def test_which_answers_are_trained(folder: Path, losses: tuple[Any, ...], train_on: Any, trained: list[int]) -> None:
    sample = one(folder, {"conversations": with_loss(*losses)}, train_on=train_on)
    assert [index for index, message in enumerate(sample.messages) if message.train] == trained


def test_unknown_train_on(folder: Path) -> None:
    with pytest.raises(ValueError, match="no train_on 'first'; there are all, last"):
        read(write(folder, {"conversations": TWO}), train_on="first")  # pyright: ignore[reportArgumentType]


USER = {"role": "user", "content": "Hi"}
TAGGED = {"role": "user", "content": "<image_00> <image_01>"}
BAD: list[tuple[Any, str]] = [
    ("x", "is a string, not an object with 'conversations'"),
    ({"image": "a.png"}, r"has no 'conversations' \(found 'id', 'image'\); add"),
    ({"conversations": {}}, "'conversations' is an object; it must be a list"),
    ({"conversations": []}, "the conversation is empty"),
    ({"conversations": [USER, "Hi"]}, "turn 1 is a string; it must be an object"),
    ({"conversations": [{"role": "user"}]}, r"turn 0: 'content' is missing \(found 'role'\)"),
    ({"conversations": [{"content": "Hi"}]}, "turn 0: 'role' is missing"),
    ({"conversations": [{"role": "user", "content": 3}]}, "turn 0: 'content' is a number; it must be a string"),
    ({"conversations": [{"from": "human", "value": None}]}, "turn 0: 'value' is null; it must be a string"),
    ({"conversations": [{"role": "bot", "content": "Hi"}]}, "turn 0 has role 'bot'; known roles are system, user"),
    ({"conversations": [USER, USER]}, "turns 0 and 1 are both user; roles must alternate"),
    ({"conversations": TURNS}, "1 <image> in the user turns, 0 images under 'image'"),
    (
        {"image": "a.png", "conversations": [QUESTION, ANSWER, QUESTION, ANSWER]},
        "2 <image> in the user turns, 1 images",
    ),
    ({"image": ["a.png", "b.png"], "conversations": TURNS}, "1 <image> in the user turns, 2 images"),
    ({"image": ["a.png", "b.png"], "conversations": [TAGGED, ANSWER]}, "<image_00>, <image_01> in the text, but"),
    ({"image": {"<image_00>": "a.png"}, "conversations": [TAGGED, ANSWER]}, "<image_01> in the text without an image"),
    (
        {"image": {f"<image_0{n}>": "a.png" for n in range(3)}, "conversations": [TAGGED, ANSWER]},
        "<image_02> under 'image' but in no user turn",
    ),
    (
        {"image": {"<image_00>": "a.png"}, "conversations": [USER, ANSWER]},
        "<image_00> under 'image' but in no user turn",
    ),
    (
        {"image": {"<image_00>": "a.png"}, "conversations": [{"role": "user", "content": "<image_00>" * 2}, ANSWER]},
        "<image_00> more than once",
    ),
    ({"image": {"image_00": "a.png"}, "conversations": TURNS}, "'image' has the key 'image_00'; keys must look like"),
    ({"image": "", "conversations": TURNS}, "an image path is an empty string; give a path, or leave 'image' out"),
    ({"image": 3, "conversations": TURNS}, "an image path is a number"),
    ({"image": "a.png", "conversations": [ANSWER]}, "has images but no user turn"),
    *(
        ({"conversations": with_loss(None, value, None, None)}, f"turn 1: 'loss' is {shown}; it must be 1 .* or 0")
        for value, shown in ((2, "2"), (0.5, "0.5"), ("1", '"1"'), ([], r"\[\]"), (-1, "-1"))
    ),
    ({"conversations": with_loss(1, None, None, None)}, "turn 0: 'loss' is 1 in a user turn; only answers are trained"),
    (
        {"images": ["a.png"], "conversations": TURNS},
        "has 'images', which the official format does not support; .* under 'image'",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records(folder: Path, record: Any, message: str) -> None:
    if isinstance(record, dict):
        record = {"id": "q9", **record}
    place = r"train.json, record 1( \(id 'q9'\))?: .*"
    with pytest.raises(DataError, match=place + message):
        read(write(folder, {"conversations": [USER, ANSWER]}, record), data_format="official")[1]


def test_missing_image_lists_the_places(folder: Path, tmp_path: Path) -> None:
    path = write(folder, {"image": "gone.png", "conversations": TURNS})
    with pytest.raises(DataError) as caught:
        read(path, image_root=tmp_path / "root")[0]
    text = str(caught.value)
    for place in (folder, tmp_path / "root", Path.cwd()):
        assert str(place / "gone.png") in text
    assert "record 0: image 'gone.png' does not exist" in text
    assert "--image_root" in text
