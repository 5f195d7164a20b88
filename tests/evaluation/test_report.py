"""The page: nothing of the data or of the model is taken for HTML, the worst come first."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

import pytest
from clips import number, write_clip
from PIL import Image

from finetune.evaluation.metrics import METRICS
from finetune.evaluation.report import build
from finetune.evaluation.scoring import make_rows, summarise
from finetune.sample import Media, Message, Sample, Source, Text

EVIL = "<script>alert('x')</script>&\"<img src=http://example.com/x.png>"


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


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
    page = build(metric, rows, {**summary, "model": EVIL}, title=EVIL, max_pixels=10**7)
    seen = Seen()
    seen.feed(page)
    images = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert len(images) == 2
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in seen.tags}
    assert "<script" not in page
    assert page.index("bad") < page.index("good")
    assert page.index('class="worse"') < page.index('class="better"')


def test_the_page_stays_small():
    metric = METRICS["exact"]
    samples = {index: (question(f"sample-{index}.", "What?"), ["red"]) for index in range(5)}
    rows = make_rows(metric, samples, ["blue"] * 5)
    page = build(metric, rows, summarise(metric, rows), title="t", most=2, max_pixels=10**7)
    assert "2 of 5 samples" in page
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
