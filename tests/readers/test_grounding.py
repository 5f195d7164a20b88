"""Names and boxes beside the text, as ms-swift keeps them, become grounding marks in the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.media import image_files
from finetune.media.image import size
from finetune.readers import read
from finetune.sample import DataError, Media, Sample

FORMS = ("official", "sharegpt", "openai", "alpaca")
BOX = [100, 50, 300, 150]  # of an image of 400 x 200
MARKED = "<box>250 250 750 750</box>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    Image.new("RGB", (400, 200)).save(data / "a.png")
    Image.new("RGB", (100, 100)).save(data / "b.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (400, 200)).save(data / "turned.jpg", exif=turned)
    return data


def one(
    folder: Path,
    objects: Any,
    answer: str = "<ref-object><bbox>",
    question: str = "What?",
    images: tuple[str, ...] = ("a.png",),
    form: str = "sharegpt",
) -> Sample:
    """A record in one of the forms."""
    question = "<image>" * len(images) + question
    if form == "alpaca":
        record: dict[str, Any] = {"instruction": question, "output": answer}
    else:
        content = [{"type": "text", "text": question}] if form == "openai" else question
        record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
    record |= {"image" if form == "official" else "images": list(images)} | ({"objects": objects} if objects else {})
    (folder / "data.json").write_text(json.dumps([record]))
    return read(folder / "data.json", data_format=form)[0]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "objects",
    [
        {"ref": ["dog"], "bbox": [BOX]},
        {"ref": ["dog"], "bbox": [BOX], "bbox_type": "real", "image_id": [0]},
        {"ref": ["dog"], "bbox": [[0.25, 0.25, 0.75, 0.75]], "bbox_type": "norm1"},
        {"ref": ["dog"], "bbox": [[250, 250, 750, 750]], "bbox_type": "norm1000"},
        json.dumps({"ref": ["dog"], "bbox": [BOX]}),
        [{"caption": "dog", "bbox": BOX, "bbox_type": "real", "image": 0}],
        json.dumps([{"caption": "dog", "bbox": [250, 250, 750, 750], "bbox_type": "norm_1000", "image": 0}]),
    ],
)
def test_forms_units_and_layouts_make_the_same_text(folder: Path, objects: Any, form: str) -> None:
    sample = one(folder, objects, form=form)
    assert sample.messages[1].text == f"<ref>dog</ref>{MARKED}"
    assert sample.notes == ()


@pytest.mark.parametrize(
    ("question", "answer", "objects", "wanted"),
    [
        # Names and boxes are two lists, taken in the order of the whole conversation.
        (
            "Find <ref-object>.",
            '[{"bbox_2d": <bbox>}]',
            {"ref": ["dog"], "bbox": [BOX]},
            f'Find <ref>dog</ref>.|[{{"bbox_2d": {MARKED}}}]',
        ),
        ("At <bbox>?", "No, <bbox>", {"bbox": [[0, 0, 400, 200], BOX]}, f"At <box>0 0 1000 1000</box>?|No, {MARKED}"),
        ("", "click(<bbox>)", {"ref": [], "bbox": [[200, 50]]}, "|click(<point>500 250</point>)"),
        # Marks that are there already are not doubled.
        ("", "<ref><ref-object></ref><box><bbox></box>", {"ref": ["a"], "bbox": [BOX]}, f"|<ref>a</ref>{MARKED}"),
        ("", "<box><bbox></box>", {"bbox": [[200, 50]]}, "|<box>500 250</box>"),
        # Older: of objects with both, only one has a place; several boxes for a name.
        ("Find <bbox>", "dog", [{"caption": "dog", "bbox": BOX}], f"Find {MARKED}|dog"),
        ("", "<ref-object>: <bbox>", [{"caption": "a", "bbox": [BOX, BOX]}], f"|<ref>a</ref>: {MARKED}{MARKED}"),
        # Rounded to the nearest thousandth; what rounds to the border is in the image.
        ("", "<bbox>", {"bbox": [[0.1, 0.3, 400.1, 199.96]]}, "|<box>0 2 1000 1000</box>"),
        ("", "<bbox>1 2 3 4</bbox> <bbox>", {"bbox": [BOX]}, f"|<bbox>1 2 3 4</bbox> {MARKED}"),
    ],
)
def test_places(folder: Path, question: str, answer: str, objects: Any, wanted: str) -> None:
    sample = one(folder, objects, answer, question)
    assert "|".join(message.text for message in sample.messages) == wanted


def test_each_box_in_its_image(folder: Path) -> None:
    objects = {"bbox": [[50, 50, 100, 100], [50, 50, 100, 100]], "image_id": [1, 0]}
    sample = one(folder, objects, "<bbox><bbox>", images=("a.png", "b.png"))
    assert sample.messages[1].text == "<box>500 500 1000 1000</box><box>125 250 250 500</box>"


def test_pixels_are_those_of_the_upright_image(folder: Path) -> None:
    """The size that the encoder sees too; said in a note, since some tools count before they turn it."""
    sample = one(folder, {"bbox": [[50, 100, 150, 300]]}, "<bbox>", images=("turned.jpg",))
    assert sample.messages[1].text == MARKED
    assert size(Media("image", folder / "turned.jpg")) == (200, 400)
    assert [note[:15] for note in sample.notes] == ["boxes in pixels"]
    with pytest.raises(DataError, match="box 0 .* is not within image 0, upright 200 x 400 pixels"):
        one(folder, {"bbox": [[100, 50, 300, 150]]}, "<bbox>", images=("turned.jpg",))
    shares = one(folder, {"bbox": [[0.25, 0.25, 0.75, 0.75]], "bbox_type": "norm1"}, "<bbox>", images=("turned.jpg",))
    assert (shares.messages[1].text, shares.notes) == (MARKED, ())


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"ref": ["a", "b"], "bbox": [BOX]}, "1 <ref-object> in the text, 2 names in 'objects'"),
        ({"ref": ["a"], "bbox": [BOX, BOX]}, "1 <bbox> in the text, 2 boxes in 'objects'"),
        ({"ref": ["a"]}, "1 <bbox> in the text, 0 boxes"),
        ({"ref": ["a"], "bbox": [[100, 50, 500, 150]]}, 'box 0 .*400 x 200 pixels; .*"bbox_type": "norm1000"'),
        ({"ref": ["a"], "bbox": [[-9, 50, 300, 150]]}, "box 0 .*is not within image 0"),
        ({"ref": ["a"], "bbox": [[300, 50, 100, 150]]}, "box 0 .*second corner is above or left"),
        ({"ref": ["a"], "bbox": [[100, 150, 300, 50]]}, "box 0 .*second corner"),
        ({"ref": ["a"], "bbox": [[0.1, 0.2, 0.5, 0.6]]}, "box 0 .* within 0 and 1, without 'bbox_type'"),
        ({"ref": ["a"], "bbox": [[0, 0, 1, 1]]}, "box 0 .* within 0 and 1, without 'bbox_type'"),
        ({"ref": ["a"], "bbox": [[0.1, 0.2, 0.5, 0.6]], "bbox_type": "real"}, "box 0 .* says pixels"),
        ({"ref": ["a"], "bbox": [[0.1, 0.2, 1.5, 0.6]], "bbox_type": "norm1"}, "box 0 .*is not within 0 and 1"),
        ({"ref": ["a"], "bbox": [[1, 2, 1001, 6]], "bbox_type": "norm1000"}, "box 0 .*not within 0 and 1000"),
        ({"ref": ["a"], "bbox": [BOX], "bbox_type": "pixels"}, "'bbox_type' is \"pixels\"; there are real"),
        ({"ref": ["a"], "bbox": [BOX], "image_id": [1]}, "box in image 1 in pixels, and the record has 1 images"),
        ({"ref": ["a"], "bbox": [BOX], "image_id": [0, 0]}, "1 boxes and 2 'image_id'"),
        ({"ref": ["a"], "bbox": [BOX], "bbox_typ": "real"}, "'objects' has 'bbox_typ'; known are"),
        ({"ref": ["a"], "bbox": [[1, 2, 3]]}, "box 0 .*must be two or four numbers"),
        ({"ref": ["a"], "bbox": [[1, 2, 3, float("inf")]]}, "box 0 .*must be two or four numbers"),
        ({"ref": ["a"], "bbox": [[1, 2, 3, "4"]]}, "box 0 .*must be two or four numbers"),
        ({"ref": [1], "bbox": [BOX]}, "name 0 is a number"),
        ({"ref": "a", "bbox": [BOX]}, "a string under 'ref'"),
        ("dog", "'objects' is a string; it must be an object"),
    ],
)
def test_what_is_refused(folder: Path, objects: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"data.json, record 0: .*{message}"):
        one(folder, objects)


def test_pixels_without_an_image(folder: Path) -> None:
    with pytest.raises(DataError, match="the record has 0 images"):
        one(folder, {"bbox": [BOX]}, "<bbox>", images=())


def test_neither_objects_nor_places_are_ignored_in_silence(folder: Path) -> None:
    sample = one(folder, {"ref": ["a"], "bbox": [BOX]}, "A dog.")
    assert [note[:27] for note in sample.notes] == ["'objects' has names or boxe"]
    sample = one(folder, None, "<ref-object> at <bbox>")
    assert sample.messages[1].text == "<ref-object> at <bbox>"
    assert [note.rpartition(": ")[2] for note in sample.notes] == ["<ref-object> and <bbox>"]


def test_columns_of_a_table(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "<bbox>"}]
    rows = [{"messages": turns, "images": ["a.png"], "objects": {"ref": [], "bbox": [BOX]}}]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    assert read(folder / "rows.parquet")[0].messages[1].text == MARKED


@pytest.mark.parametrize("turn", range(1, 9))
def test_upright(turn: int) -> None:
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = turn
    assert image_files.upright_size(image) == ((2, 4) if turn > 4 else (4, 2), turn > 1)
