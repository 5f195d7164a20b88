"""The page: nothing of the data or of the model is taken for HTML, the worst come first."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from clips import number, write_clip
from page_reading import assert_safe
from PIL import Image

from finetune.evaluation.evaluation_report import build
from finetune.evaluation.metrics import METRICS
from finetune.evaluation.scoring import make_rows, summarise
from finetune.media import image as images
from finetune.sample import Media, Message, Sample, Source, Text

EVIL = "<script>alert('x')</script>&\"<img src=http://example.com/x.png>"


def question(name: str, text: str) -> Sample:
    parts = (Media("image", Image.new("RGB", (640, 480), "red")), Text(text))
    return Sample(id=name, source=Source("data.json", 0, name), messages=(Message("user", parts),))


def test_everything_is_escaped_and_the_worst_come_first():
    metric = METRICS["normalised"]
    samples = {0: (question("good", "What?"), ["red"]), 1: (question(f"bad{EVIL}", EVIL), [EVIL])}
    rows = make_rows(metric, samples, ["red", f"{EVIL}!x"], ["blue", EVIL])
    summary = summarise(metric, rows)
    assert summary["scores"] == {"normalised": 0.5}
    assert summary["base"] == {"normalised": 0.5}
    assert (summary["better"], summary["worse"], summary["other_answer"]) == (1, 1, 2)
    page = build(metric, rows, {**summary, "model": EVIL, "why": f"auto: {EVIL}"}, title=EVIL, max_pixels=10**7)
    seen = assert_safe(page)
    assert len(seen.of("img")) == 2
    assert seen.text.index("bad") < seen.text.index("good")
    kinds = [attributes["class"] for attributes in seen.of("article")]
    assert kinds == ["card worse", "card better"]
    assert seen.text.count("alert('x')") >= 6


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_no_name_of_the_program_stands_on_the_page(name, compared):
    metric = METRICS[name]
    box = '{"box": "<box>1 2 3 4</box>"}'
    samples = {0: (question("a", "What?"), [box] * 10)}
    rows = make_rows(metric, samples, [box], [box] if compared else None)
    summary = {**summarise(metric, rows), "why": "auto: words", "left_out": "2", "compared_with": "base"}
    text = assert_safe(build(metric, rows, summary, title="Answers", max_pixels=10**7)).text
    assert not re.findall(r"\b[a-z]+_[a-z]+\b|\bwhy\b|acc@", text)
    assert ("lower is better" if not metric.higher else "higher is better") in text


def boxes_drawn(page: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind, paths in re.findall(r'<g class="(reference|answer|base)">(.*?)</g>', page):
        found[kind] = re.findall(r' d="([^"]*)"', paths)
    return found


def test_boxes_are_drawn_on_their_picture():
    metric = METRICS["box_iou"]
    samples = {0: (question("a", "Where?"), ["<box>10 20 300 400</box>"])}
    rows = make_rows(metric, samples, ["<box>1 2 3 4</box> and <point>500 600</point>"], ["no"])
    page = build(metric, rows, summarise(metric, rows), title="t", max_pixels=10**7)
    drawn = boxes_drawn(page)
    assert drawn["reference"] == ["M10.0 20.0H300.0V400.0H10.0Z"]
    assert drawn["answer"] == ["M1.0 2.0H3.0V4.0H1.0Z", "M500.0 600.0h0"]
    assert drawn["base"] == []
    assert 'viewBox="0 0 1000 1000"' in page


@pytest.mark.parametrize("reference", ["<box>10 20 1300 400</box>", "<box>-1 2 3 4</box>", "nothing"])
def test_boxes_on_another_scale_are_not_drawn(reference):
    metric = METRICS["box_iou"]
    rows = make_rows(metric, {0: (question("a", "Where?"), [reference])}, ["<box>1 2 3000 4</box>"])
    assert boxes_drawn(build(metric, rows, summarise(metric, rows), title="t", max_pixels=10**7)) == {}


def test_what_can_be_filtered_is_counted():
    metric = METRICS["exact"]
    samples = {n: (question(str(n), "What?"), ["a"]) for n in range(6)}
    rows = make_rows(metric, samples, list("aabbca"), list("babacc"))
    seen = assert_safe(build(metric, rows, summarise(metric, rows), title="t", max_pixels=10**7))
    tags = [json.loads(each["data-tags"] or "") for each in seen.of("article")]
    for button in seen.of("button"):
        word = button["value"]
        number = sum(word in each for each in tags) if word else 6
        assert f"{word or 'all'} {number}" in seen.text
    assert [sum(word in each for each in tags) for word in ("better", "worse", "changed")] == [2, 1, 3]


def test_a_file_asked_about_twice_is_decoded_once(tmp_path, monkeypatch):
    """Each question still has its own pictures."""
    metric, paths = METRICS["exact"], [tmp_path / name for name in ("a.png", "b.png")]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (64, 48), colour).save(path)
    samples = {}
    for index, path in enumerate((*paths, *paths)):
        asked = Message("user", (Media("image", path), Text("What?")))
        samples[index] = (Sample(id=str(index), source=Source("data.json", index), messages=(asked,)), ["a"])
    decoded: list[Path] = []
    load = images.load
    monkeypatch.setattr(images, "load", lambda media, *rest: decoded.append(media.data) or load(media, *rest))
    rows = make_rows(metric, samples, ["a"] * 4)
    seen = assert_safe(build(metric, rows, summarise(metric, rows), title="t", max_pixels=10**7))
    assert sorted(decoded) == paths
    shown = [each["src"] for each in seen.of("img")]
    assert len(set(shown[:2])) == 2
    assert shown == shown[:2] * 2


def test_the_page_stays_small():
    metric = METRICS["exact"]
    samples = {index: (question(f"sample-{index}.", "What?"), ["red"]) for index in range(5)}
    rows = make_rows(metric, samples, ["blue"] * 5)
    page = build(metric, rows, summarise(metric, rows), title="t", most=2, max_pixels=10**7)
    assert "The 2 worst answers, worst first" in page
    assert page.count("<img") == 2


def test_a_video_is_a_strip_of_three_frames(tmp_path):
    parts = (Media("video", write_clip(tmp_path / "a.mp4", 9, size=(120, 60))), Text("What?"))
    sample = Sample(id="clip", source=Source("data.json", 0), messages=(Message("user", parts),))
    rows = make_rows(METRICS["exact"], {0: (sample, ["red"])}, ["blue"])
    page = build(METRICS["exact"], rows, summarise(METRICS["exact"], rows), title="t", max_pixels=10**7)
    strip = Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split('"')[0])))
    assert strip.width == pytest.approx(6 * strip.height, rel=0.05)
    thirds = [
        strip.crop((place * strip.width // 3, 0, (place + 1) * strip.width // 3, strip.height)) for place in range(3)
    ]
    assert [number(third) for third in thirds] == [1, 4, 7]
