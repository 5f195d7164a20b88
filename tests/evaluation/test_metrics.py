"""The metrics against published and hand-computed values."""

from __future__ import annotations

import pytest

from finetune.evaluation.metrics import METRICS, MetricError, choose, resolve_metric
from finetune.evaluation.metrics.boxes import boxes, matched_iou
from finetune.evaluation.metrics.vqa import normalise as vqa_normalise


def score(name: str, prediction: str, *references: str) -> float:
    return METRICS[name].score(prediction, references)[name]


@pytest.mark.parametrize(
    ("name", "prediction", "references", "expected"),
    [
        ("exact", " red\n", ["red"], 1),
        ("exact", "Red", ["red"], 0),
        ("normalised", "The  Red, car!", ["red car"], 1),
        ("normalised", "red cars", ["red car"], 0),
        ("normalised", "b", ["a b", "b"], 1),
        # precision 2/3, recall 2/4
        ("token_f1", "the cat sat down", ["a cat sat on mats"], 2 * 2 / (3 + 4)),
        ("token_f1", "", ["the"], 1),
        ("token_f1", "x", [""], 0),
        ("relaxed", "104", ["100"], 1),
        ("relaxed", "105", ["100"], 1),
        ("relaxed", "105.1", ["100"], 0),
        ("relaxed", "0.12", ["12%"], 1),
        ("relaxed", "0.01", ["0"], 0),
        ("relaxed", "Yes", ["yes"], 1),
        ("relaxed", "-96", ["-100"], 1),
        # 1 - 1/5; 1 - 3/5 is below the threshold
        ("anls", "Hallo", ["hello"], 0.8),
        ("anls", "hexyz", ["hello"], 0),
        ("anls", "helo", ["x", "hello"], 0.8),
        ("anls", "ab", ["ac"], 0),
        ("choice", "(B)", ["b"], 1),
        ("choice", "B. a cat", ["B"], 1),
        ("choice", "The answer is (c).", ["C"], 1),
        ("choice", "I think it's D", ["D"], 0),
        ("choice", "it must be D", ["D"], 1),
        ("choice", "A cat and a dog", ["A"], 1),
        ("choice", "maybe A or B", ["A"], 0),
        ("choice", "Bananas", ["B"], 0),
    ],
)
def test_short_texts(name, prediction, references, expected):
    assert score(name, prediction, *references) == pytest.approx(expected)


def test_rouge_l_of_the_paper():
    """Lin (2004), section 3.1: "police killed the gunman" against two candidates."""
    reference = "police killed the gunman"
    assert score("rouge_l", "police kill the gunman", reference) == pytest.approx(0.75)
    assert score("rouge_l", "the gunman kill police", reference) == pytest.approx(0.5)
    assert score("rouge_l", "红色的圆", "红色的方") == pytest.approx(0.75)


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_people(agreeing, expected):
    """The published rule gives multiples of 0.3 after averaging over the ten sets of nine."""
    answers = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    assert score("vqa", "Yes.", *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The two dogs!", "2 dogs"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("3.5 m.", "3.5 m"),
        ("none", "0"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert vqa_normalise(text) == expected


def test_error_rates_are_pooled_over_the_data_set():
    cer, wer = METRICS["cer"], METRICS["wer"]
    assert cer.score("kitten", ["sitting"])["cer"] == pytest.approx(3 / 7)
    assert wer.score("the cat  sat", ["the cat sat down"])["wer"] == pytest.approx(1 / 4)
    assert wer.score("a b c d", ["a"])["wer"] == pytest.approx(3)
    assert cer.score("abc", [""])["cer"] == 3
    scores = [wer.score("x", ["a"]), wer.score("a b c", ["a b c"])]
    assert wer.combine(scores)["wer"] == pytest.approx(1 / 4)
    assert sorted(scores, key=wer.sort_key)[-1]["wer"] == 1


def test_boxes_are_read_in_every_form():
    expected = [(296, 301, 327, 320)]
    assert boxes("<box> 296 301 327 320</box>") == expected
    assert boxes("<box>(296,301),(327,320)</box>") == expected
    assert boxes("<box>296, 301, 327, 320</box>") == expected
    assert boxes("<box>1 2 3</box> and <box>a</box>") == []
    assert boxes("<box>0.25, 0.5, 0.75, 1</box>") == [(0.25, 0.5, 0.75, 1)]


def test_box_iou():
    # 50 x 100 in common, 15000 together
    figures = METRICS["box_iou"].score("<box>50 0 150 100</box>", ["<box>(0,0),(100,100)</box>"])
    assert figures == {
        "box_iou": pytest.approx(1 / 3), "acc@0.2": 1.0, "acc@0.5": 0.0, "acc@0.7": 0.0, "acc@0.9": 0.0
    }  # fmt: skip
    half = METRICS["box_iou"].score("<box>0 0 50 100</box>", ["<box>0 0 100 100</box>"])
    assert half["acc@0.5"] == 0, "above, not at"
    assert score("box_iou", "nothing", "<box>0 0 1 1</box>") == 0
    assert score("box_iou", "<box>5 5 5 5</box>", "<box>5 5 5 5</box>") == 0
    assert matched_iou([(0, 0, 1, 1)], [(0, 0, 1, 1), (2, 2, 3, 3)]) == 0.5
    assert matched_iou([(0, 0, 1, 1), (0, 0, 1, 1)], [(0, 0, 1, 1)]) == 0.5


def test_point_in_box():
    box = "<box>100 100 200 200</box>"
    assert score("point_in_box", "<point> 100 200</point>", box) == 1
    assert score("point_in_box", "<box>(90,90),(150,150)</box>", box) == 1
    assert score("point_in_box", "click (150, 150)", box) == 1
    assert score("point_in_box", "<point>99 150</point>", box) == 0
    assert score("point_in_box", "there", box) == 0


def test_json_field_f1():
    reference = '{"total": "3", "menu": [{"name": "tea"}, {"name": "cake"}]}'
    # two of two fields right, of three
    assert score("json_f1", '{"menu": [{"name": "cake"}, {"name": "tea"}]}', reference) == pytest.approx(0.8)
    assert score("json_f1", f"Here:\n```json\n{reference}\n```", reference) == 1
    assert score("json_f1", '{"total": 3.0, "menu": []}', reference) == pytest.approx(0.5)
    assert score("json_f1", "no", reference) == 0


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([["yes"] * 10], "vqa"),
        ([["a", "b"], ["c", "d", "e"]], "anls"),
        ([["<box>1 2 3 4</box>"], ["<box>(1,2),(3,4)</box>"]], "box_iou"),
        ([['{"a": 1}']], "json_f1"),
        ([["A"], ["(B)"]], "choice"),
        ([["12"], ["7.5%"]], "relaxed"),
        ([["red"], ["a dark blue"]], "normalised"),
        ([["The picture shows a red circle on white."]], "rouge_l"),
        ([["这张图片展示了一个红色的圆形，下面写着停止两个字，背景是白色的，旁边还有一只小猫和一条小狗。"]], "rouge_l"),
    ],
)
def test_auto(references, expected):
    assert choose(references)[0] == expected
    metric, reason = resolve_metric("auto", references)
    assert metric.name == expected
    assert reason.startswith("auto: ")


def test_thinking_is_not_scored():
    assert METRICS["exact"].figures("<think>\nIs it red?\n</think>\n\nblue", ["<think>x</think>blue"]) == {"exact": 1}
    assert METRICS["exact"].figures("blue", ["blue"]) == {"exact": 1}


def test_own_functions(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prediction, references):\n    return len(prediction) == len(references[0])\n"
        "def two(prediction, references):\n    return {'good': 0.5, 'bad': 2}\n"
        "def wrong(prediction, references):\n    return 'x'\n"
    )
    metric, reason = resolve_metric(f"{file}:length", [["a"]])
    assert metric.score("x", ["y"]) == {"length": 1.0}
    assert str(file) in reason
    monkeypatch.syspath_prepend(tmp_path)
    metric, _ = resolve_metric("mine:two", [["a"]])
    assert metric.combine([metric.score("x", ["y"])] * 2) == {"two": 0.5, "good": 0.5, "bad": 2.0}
    with pytest.raises(MetricError, match="must return a finite number"):
        resolve_metric("mine:wrong", [["a"]])[0].score("x", ["y"])
    with pytest.raises(MetricError, match="has no function 'absent'"):
        resolve_metric("mine:absent", [["a"]])
    with pytest.raises(MetricError, match="did you mean 'rouge_l'"):
        resolve_metric("rouge", [["a"]])
    with pytest.raises(MetricError, match="no such file"):
        resolve_metric("nowhere/x.py:f", [["a"]])
    with pytest.raises(MetricError, match="PYTHONPATH"):
        resolve_metric("no_such_package_at_all:f", [["a"]])
