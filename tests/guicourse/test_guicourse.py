"""Published records with known training data, predictions with known scores."""

from __future__ import annotations

import base64
import io
import json
import runpy
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from finetune.commands import guicourse
from finetune.guicourse.actions import Action, from_label, read, write
from finetune.guicourse.gui_scores import clean, region_scores, step_score, text_scores
from finetune.guicourse.record_conversion import RecordError, to_training
from finetune.readers import read as read_data
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
make = runpy.run_path(str(ROOT / "examples/guicourse/make_data.py"))["make"]
SIZE = (1000.0, 500.0)
PAGE = [
    {"uid": 7, "rect": {"x": 100, "y": 50, "width": 100, "height": 50}},
    {"uid": 8, "rect": {"x": 300, "y": 50, "width": 100, "height": 50}},
]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("published"), 3, 2)


def convert(*words: object) -> int:
    return guicourse.main(["convert", *map(str, words)])


def test_conversion_gives_the_form_of_the_assignment(published, tmp_path):
    assert convert("--data", published, "--out", tmp_path, "--merge", "all.json") == 0
    (first, second, *_) = json.loads((tmp_path / "ocr_grounding_test.json").read_text())
    published_first = json.loads((published / "ocr_grounding_test_data.json").read_text())[0]
    numbers = [round(float(x) * 1000) for x in published_first["question"]["related"][5:-6].split(", ")]
    region = "<box>({},{}),({},{})</box>".format(*numbers)
    assert first == {
        "id": "uid_img_page-test-0_bbox2text_00",
        "image": "images/guienv/chunk_0/page-test-0.png",
        "conversations": [
            {
                "role": "user",
                "content": "<image>\n## Your Task\nIf the input is a string, please give me the element regions "
                "including this string. Else if the input is a region, please give me the string (text) in this "
                f"region.## Input\n{region}\n## Output\n",
            },
            {"role": "assistant", "content": published_first["answer"]},
        ],
    }
    assert second["conversations"][1]["content"] == region
    web = json.loads((tmp_path / "web-single_test.json").read_text())[0]
    assert web["conversations"][0]["content"].startswith("<image>\nYour Task\nOpen ")
    assert web["conversations"][0]["content"].endswith("\nGenerate next actions to do this task.")
    assert web["conversations"][1]["content"].startswith("thoughts: click on ")
    assert "\nactions:\nclick, <box>(" in web["conversations"][1]["content"]
    phone = json.loads((tmp_path / "smartphone_train.json").read_text())[1]
    assert phone["image"] == "images/guiact/smartphone/record_train001/step_00.png"
    assert phone["conversations"][1]["content"].startswith("actions:\ntap, <point>(")
    chat = json.loads((tmp_path / "guichat.json").read_text())[0]
    assert chat["image"] == "images/guichat/chunk_0/page-train-0.png"
    assert chat["conversations"][0]["content"].startswith("<image>\nWhere is ")
    merged = read_data(tmp_path / "all.json")
    assert len(merged) == 28
    assert [len(list(sample.media("image"))) for sample in merged] == [1] * len(merged)


def test_conversations_keep_their_places_and_images():
    turns = [
        {"from": "human", "value": "<image>a</image>\nLook at <box>0.1, 0.2, 0.3, 0.45</box> and <point>7 8</point>."},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "And <image>b</image>?"},
        {"from": "gpt", "value": "No."},
    ]
    record = to_training({"uid": "u", "image_id": "a", "text": turns}, {"a": "a.png", "b": "b.png"})
    assert record["image"] == ["a.png", "b.png"]
    first, _, third, _ = (turn["content"] for turn in record["conversations"])
    assert first == "<image>\nLook at <box>(100,200),(300,450)</box> and <point>(7,8)</point>."
    assert third == "And <image>?"
    plain = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi <box>1 2 3 4</box>"}]
    record = to_training({"uid": "u", "image_id": "a", "text": plain}, {"a": "a.png"}, "plain")
    assert [turn["content"] for turn in record["conversations"]] == ["<image>\nHello", "Hi <box>1 2 3 4</box>"]
    with pytest.raises(RecordError, match="do not alternate between question and answer"):
        to_training({"uid": "u", "image_id": "a", "text": plain[:1]}, {"a": "a.png"})


def test_images_are_written_once(published, tmp_path):
    words = ("--data", published / "web-single_test_data.json", "--out", tmp_path)
    assert convert(*words) == 0
    images = sorted((tmp_path / "images").rglob("*.png"))
    assert len(images) == 2
    with Image.open(images[0]) as image:
        assert image.size == (168, 112)
    images[0].write_bytes(b"kept")
    images[1].unlink()
    assert convert(*words) == 0
    assert images[0].read_bytes() == b"kept"
    assert images[1].is_file()
    assert not list(tmp_path.rglob("*_bad.jsonl"))
    assert convert(*words[:3], tmp_path / "b", "--original", "--boxes", "plain") == 0
    assert sorted(path.suffix for path in (tmp_path / "b/images").rglob("page*")) == [".jpg", ".jpg"]
    assert "<box>(" not in (tmp_path / "b/web-single_test.json").read_text()


def test_bad_rows_are_listed(tmp_path, capsys):
    written = io.BytesIO()
    Image.new("RGB", (8, 8)).save(written, "PNG")
    good = base64.b64encode(written.getvalue()).decode()
    table = pa.table({"index": ["a", "broken", "../up"], "base64": [good, "AAAA", good]})
    parquet.write_table(table, tmp_path / "web-single_test_images.parquet")
    row = {"uid": "u", "image_id": "a", "image_size": {"width": 8, "height": 8}, "question": "q", "thoughts": ""}
    row |= {"actions_history": "", "logs": "", "actions_label": [{"name": "enter"}]}
    outside = {"name": "tap", "point": {"absolute": "<point>9, 1</point>", "related": "<point>1.1, 0.1</point>"}}
    rows = [
        row,
        {**row, "uid": "b", "image_id": "broken"},
        {**row, "uid": "c", "image_id": "nowhere"},
        {**row, "uid": "d", "actions_label": [outside]},
        {**row, "uid": "e", "actions_label": [{"name": "dance"}]},
        {**row, "uid": "f", "question": "what is <image>?"},
        {**row, "uid": "g", "image_id": "../up"},
        {**row, "uid": "h", "actions_label": None},
        "text",
        {"uid": "x"},
    ]
    (tmp_path / "web-single_test_data.json").write_text(json.dumps(rows))
    assert convert("--data", tmp_path / "web-single_test_data.json", "--out", tmp_path / "out") == 0
    assert [record["id"] for record in json.loads((tmp_path / "out/web-single_test.json").read_text())] == ["u"]
    bad = [json.loads(line) for line in (tmp_path / "out/web-single_test_bad.jsonl").read_text().splitlines()]
    assert [row["record"] for row in bad] == list(range(1, 10))
    expected = ["cannot be decoded", "not in the image files", "leaves the image", "unknown action 'dance'"]
    expected += [
        "2 image tags",
        "is not a file name",
        "not of the published form",
        "is not an object",
        "has no 'image_id'",
    ]
    for row, message in zip(bad, expected, strict=True):
        assert message in row["message"]
    assert "9 skipped" in capsys.readouterr().out
    assert not (tmp_path / "up.png").exists()


def test_wrong_files_are_named(published, tmp_path):
    with pytest.raises(UserError, match=r"no file there is named \*_data.json"):
        convert("--data", tmp_path, "--out", tmp_path)
    (tmp_path / "x_data.json").write_text('[{"uid": "a", "image_id": "b", "text": []}]')
    with pytest.raises(UserError, match=r"x_images.parquet: no such file"):
        convert("--data", tmp_path / "x_data.json", "--out", tmp_path)
    (tmp_path / "x_images.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="not a Parquet file"):
        convert("--data", tmp_path / "x_data.json", "--out", tmp_path)
    (tmp_path / "x_data.json").write_text('[{"a": 1, "image_id": "b"}]')
    with pytest.raises(UserError, match="the first has neither task_type"):
        convert("--data", tmp_path / "x_data.json", "--out", tmp_path)


LABELS = {
    "click": {"name": "click", "element": {"id": 7, "absolute": "<box>100, 50, 200, 100</box>"}},
    "tap": {"name": "tap", "point": {"absolute": "<point>500, 485</point>", "related": "<point>0.500, 0.970</point>"}},
    "input": {"name": "input", "text": "capital of brazil"},
    "select": {
        "name": "select",
        "text": "Price",
        "element": {"id": 7, "absolute": "<box>100, 50, 200, 100</box>"},
    },
    "select_text": {
        "name": "select_text",
        "dual_point": {"absolute": {"from": "<point>100, 100</point>", "to": "<point>200, 200</point>"}},
    },
    "scroll": {"name": "scroll", "scroll": {"absolute": {"down": "400", "right": "0"}}},
    "swipe": {
        "name": "swipe",
        "dual_point": {"absolute": {"from": "<point>500, 400</point>", "to": "<point>520, 100</point>"}},
    },
    "enter": {"name": "enter"},
    "answer": {"name": "answer", "text": "task complete"},
    "go_back": {"name": "go_back"},
}


@pytest.mark.parametrize(
    ("label", "prediction", "success", "score"),
    [
        # the element is found by IoU, or by the distance of the centre
        ("click", "click,<box> 100 100 200 200</box>", True, 1),
        ("click", "click, <box>(100,100),(150,200)</box>", True, 0.5),
        ("click", "click,<box> 210 100 220 120</box>", True, 0),
        ("click", "click,<box> 300 100 400 200</box>", False, 0),
        ("click", "hover,<box> 100 100 200 200</box>", False, 0),
        # 0.07 of the allowed 0.14 away
        ("tap", "tap, <point> 500 970</point>", True, 1),
        ("tap", "tap, <point>(570,970)</point>", True, 0.5),
        ("tap", "tap, <point> 641 970</point>", False, 0),
        ("input", "input, capital of brazil", True, 1),
        ("input", "input, capital brazil", True, 0.8),
        ("input", "input, x y brazil", False, 1 / 3),
        ("select", "select,<box> 100 100 200 200</box>, Price", True, 1),
        ("select", "select,<box> 100 100 200 200</box>, Name", False, 0.5),
        ("select_text", "select_text, from <point> 100 200</point>  to <point> 200 400</point> ", True, 1),
        ("select_text", "select_text, from <point> 200 400</point> to <point> 100 200</point>", True, 1),
        ("select_text", "select_text, from <point> 100 200</point> to <point> 150 400</point>", False, 0.5),
        ("scroll", "scroll, down 10 right -4", True, 1),
        ("scroll", "scroll, down -10 right 0", False, 0),
        ("swipe", "swipe, from <point> 100 900</point>  to <point> 100 100</point>", True, 1),
        ("swipe", "swipe, from <point> 100 900</point>  to <point> 900 900</point>", False, 0),
        ("enter", "enter", True, 1),
        ("answer", "answer, task complete", True, 1),
        ("answer", "task complete", True, 1),
        ("go_back", "go_back", True, 1),
        ("enter", "", False, 0),
        ("tap", "tap, <point> 500</point>", False, 0),
    ],
)
def test_actions_are_scored_as_published(label, prediction, success, score):
    given = read(f"thoughts: x\nactions:\n{prediction}")
    result = step_score(given, LABELS[label], SIZE, PAGE)
    assert (result.success, result.score) == (success, pytest.approx(score))


def test_a_step_of_several_actions():
    labels = [LABELS["click"], LABELS["input"], LABELS["enter"]]
    lines = ["click,<box> 100 100 200 200</box>", "input, capital of brazil", "enter"]
    full = step_score(read("\n".join(lines)), labels, SIZE, PAGE)
    assert (full.types, full.success, full.score) == (True, True, 1)
    short = step_score(read("\n".join(lines[:2])), labels, SIZE, PAGE)
    assert (short.types, short.success, short.score) == (False, False, pytest.approx(2 / 3))
    more = step_score(read("\n".join([*lines, "enter"])), labels, SIZE, PAGE)
    assert (more.types, more.success) == (False, True), "further actions do no harm, as in the published scorer"
    broken = step_score(read("\n".join([lines[0], "tap, <point> 1</point>"])), labels, SIZE, PAGE)
    assert (broken.types, broken.score) == (False, 0), "one part that cannot be read spoils all"


def test_what_is_written_can_be_read():
    actions = [Action("click", (1, 2, 3, 4)), Action("select", (1, 2, 3, 4), "a, b"), Action("tap", (5, 6))]
    actions += [Action("swipe", (1, 2, 3, 4)), Action("scroll", (400, 0)), Action("input", text="x, y"), Action("copy")]
    for form in ("parentheses", "plain"):
        assert read(f"actions:\n{write(actions, form)}") == actions
    assert write([Action("answer", text="two\nlines")]) == "answer, two lines"
    assert read('```json\n[{"name": "tap", "point": "<point>5, 6</point>"}]\n```', "JSON") == [actions[2]]
    assert from_label({"name": "copy_text"}, "absolute") == Action("copy")


def test_regions_and_texts():
    label = [(100.0, 50.0, 200.0, 100.0), (500.0, 50.0, 600.0, 100.0)]
    assert region_scores("<box>  100 100 200 200</box>", label, SIZE)["iou@0.9"] == 1
    both = region_scores("<box>100 100 200 200</box>\n<box>(0,0),(9,9)</box>", label, SIZE)
    assert list(both.values()) == [1, 0, 0, 0], "the mean of 1 and 0 is not above 0.5"
    assert region_scores("<box>0.100, 0.100, 0.200, 0.200</box>", label, SIZE)["iou@0.9"] == 1
    assert region_scores("<box>100 50 200 100</box>", label, SIZE, "absolute")["iou@0.9"] == 1
    assert region_scores("none", label, SIZE) == dict.fromkeys(["iou@0.2", "iou@0.5", "iou@0.7", "iou@0.9"], 0)
    assert text_scores("prompt\x04 Contact us", "Contact us") == {"text_em": 1, "text_f1": 1}
    assert text_scores("contact", "Contact us") == {"text_em": 0, "text_f1": pytest.approx(2 / 3)}
    assert clean(" x ") == "x"


def test_the_score_table(published, tmp_path, capsys):
    labels = json.loads((published / "web-multi_test_data.json").read_text())
    box = labels[0]["actions_label"][0]["element"]["related"][5:-6].split(", ")
    right = f"click,<box> {' '.join(str(round(float(x) * 1000)) for x in box)}</box>\ninput, wrong"
    rows = [{"uid": labels[0]["uid"], "pred": f"actions:\n{right}", "position_format": "related_version1"}]
    (tmp_path / "pred.json").write_text(json.dumps([*rows, {"uid": "other", "pred": ""}]))
    words = ["score", "--data", published / "web-multi_test_data.json", "--pred", tmp_path / "pred.json"]
    assert guicourse.main([*map(str, words), "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["samples"], scores["missing"]) == (2, 1)
    assert (scores["type_em"], scores["step_success"]) == (0.5, 0)
    assert scores["actions"]["click"] == {"count": 2, "named": 0.5, "success": 0.5, "score": pytest.approx(0.5, 0.1)}
    assert scores["actions"]["input"]["named"] == 0.5
    assert scores["groups"]["click, input"]["count"] == 2
    shown = capsys.readouterr().out
    assert "type_em        0.5000" in shown
    assert "1 predictions match no sample" in shown
    labels = json.loads((published / "ocr_grounding_test_data.json").read_text())
    lines = [{"id": row["uid"], "prediction": row["answer"]} for row in labels if row["task_type"] == "bbox2text"]
    (tmp_path / "pred.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["score", "--data", published / "ocr_grounding_test_data.json", "--pred", tmp_path / "pred.jsonl"]
    assert guicourse.main([*map(str, words), "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["text_em"], scores["text_f1"], scores["iou@0.2"], scores["missing"]) == (1, 1, 0, 2)


def test_clicks_need_the_page(published, tmp_path):
    labels = json.loads((published / "web-single_test_data.json").read_text())
    (tmp_path / "web_data.json").write_text(json.dumps(labels))
    rows = [{"uid": row["uid"], "pred": "click,<box> 1 2 3 4</box>"} for row in labels]
    (tmp_path / "pred.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"elements of the page: give the published Parquet file .* with --images"):
        guicourse.main(["score", "--data", str(tmp_path / "web_data.json"), "--pred", str(tmp_path / "pred.json")])
    (tmp_path / "pred.json").write_text('[{"uid": "a"}]')
    with pytest.raises(UserError, match="needs 'uid' and 'pred'"):
        guicourse.main(["score", "--data", str(tmp_path / "web_data.json"), "--pred", str(tmp_path / "pred.json")])
