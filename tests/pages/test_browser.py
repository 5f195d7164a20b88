"""The pages in headless Chromium: nothing is cut off, nothing is loaded, keys and filters work. Needs playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clips import write_clip
from PIL import Image
from transformers import TrainerState, TrainingArguments
from zoo import gradient

from finetune.commands.check import main as check
from finetune.evaluation.evaluation_report import build
from finetune.evaluation.metrics import METRICS
from finetune.evaluation.scoring import make_rows, summarise
from finetune.evaluation.training_report import RunFacts, build_run
from finetune.sample import Media, Message, Sample, Source, Text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
LONG = "word" * 90 + "<script>document.title = 'taken'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tiny, tmp_path_factory) -> dict[str, Path]:
    """The three pages, with a long word in every text."""
    import json

    folder = tmp_path_factory.mktemp("pages")
    gradient(1344, 1008).save(folder / "a.png")
    turns = [{"role": "user", "content": f"<image>{LONG}"}, {"role": "assistant", "content": f"{LONG} {LONG}"}]
    records = [{"id": f"{LONG}{n}", "image": str(folder / "a.png"), "conversations": turns} for n in range(3)]
    long = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "word " * 1000}]
    moving = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "A."}]
    write_clip(folder / "a.mp4", 8, fps=4, size=(320, 160))
    records += [
        {"id": "long", "conversations": long},
        {"id": "clip", "video": str(folder / "a.mp4"), "conversations": moving},
    ]
    records += [{"id": "gone", "image": "gone.png", "conversations": turns}]
    (folder / "data.json").write_text(json.dumps(records))
    command = ["--model", str(tiny("v2_6")), "--data", str(folder / "data.json"), "--model_max_length", "4096"]
    command += ["--video_max_slice_nums", "4"]
    check([*command, "--html", str(folder / "preview.html")])
    parts = (Media("image", Image.new("RGB", (640, 480), "red")), Text(LONG))
    samples = {
        n: (Sample(str(n), Source(LONG, n), (Message("user", parts),)), ["<box>1 2 300 400</box>"]) for n in range(3)
    }
    metric = METRICS["box_iou"]
    same = "<box>1 2 300 400</box>"
    rows = make_rows(metric, samples, [same, LONG, LONG], [LONG, same, LONG])
    page = build(metric, rows, {**summarise(metric, rows), "model": LONG}, title=LONG, max_pixels=10**7)
    (folder / "evaluation.html").write_text(page)
    facts = RunFacts(
        LONG, "MiniCPM-V 2.6", True, [("llm", LONG, 10**10, 10**9, 1e-4)], [("data_path", LONG, LONG)], 10**7
    )
    state = TrainerState(global_step=90, max_steps=90, epoch=1.0)
    norms = {f"grad_norm_{part}": 0.5 for part in ("vision", "resampler", "llm", "audio")}
    state.log_history = [{"step": step, "loss": 100 / step, "grad_norm": 1.0, **norms} for step in range(1, 91)]
    text = build_run(facts, TrainingArguments(output_dir=str(folder / ("o" * 200)), use_cpu=True), state, (), 9.0)
    (folder / "training.html").write_text(text)
    return {name: folder / f"{name}.html" for name in ("preview", "evaluation", "training")}


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    page, seen = browser.new_page(**options), []
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on(
        "request", lambda request: seen.append(request.url) if not request.url.startswith(("file:", "data:")) else 0
    )
    page.goto(path.as_uri())
    return page, seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["preview", "evaluation", "training"])
def test_nothing_is_cut_off_and_nothing_goes_wrong(name, width, scheme, browser, pages):
    page, seen = opened(browser, pages[name], viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert page.title() != "taken"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Every text lies inside of the page, whatever holds it; what scrolls by itself aside.
    outside = page.evaluate(
        """width => [...document.querySelectorAll("main *, header *")]
        .filter(each => !each.closest(".tokens, pre") && each.getClientRects().length)
        .filter(each => each.getBoundingClientRect().right > width + 1)
        .map(each => each.outerHTML.slice(0, 80))""",
        width,
    )
    assert outside == []
    assert page.evaluate("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    light, dark = (page.evaluate(f"getComputedStyle(document.body).{each}") for each in ("color", "backgroundColor"))
    bright = sum(map(int, light.removeprefix("rgb(").removesuffix(")").split(",")))
    assert (bright > 3 * 128) == (scheme == "dark")
    assert light != dark
    assert seen == []
    if (folder := os.environ.get("SCREENSHOTS")) is not None:
        page.screenshot(path=f"{folder}/{name}-{width}-{scheme}.png", full_page=True)
    page.close()


def test_a_filter_leaves_only_its_cards(browser, pages):
    page, _ = opened(browser, pages["evaluation"])
    for word, number in (("better", 1), ("worse", 1), ("changed", 2), ("unchanged", 1), ("", 3)):
        page.locator(f'.filter button[value="{word}"]').click()
        assert page.locator(".card:visible").count() == number
    page.close()


def test_a_picture_enlarges_and_closes_by_keys(browser, pages):
    page, _ = opened(browser, pages["evaluation"], viewport={"width": 1280, "height": 844})
    summary = page.locator(".zoom > summary").first
    small = page.locator(".zoom img").first.bounding_box()
    summary.focus()
    page.keyboard.press("Enter")
    large = page.locator(".zoom img").first.bounding_box()
    assert large["width"] > 1.5 * small["width"]
    drawn = page.locator(".zoom .boxes").first.bounding_box()
    assert [round(drawn[key]) for key in ("x", "y", "width", "height")] == [
        round(large[key]) for key in ("x", "y", "width", "height")
    ]
    page.keyboard.press("Escape")
    assert page.locator(".zoom[open]").count() == 0
    page.close()


@pytest.mark.parametrize("name", ["preview", "evaluation", "training"])
def test_without_scripts_everything_is_there(name, browser, pages):
    page, seen = opened(browser, pages[name], java_script_enabled=False)
    assert page.locator(".filter:visible").count() == 0
    assert page.locator(".card:visible").count() == page.locator(".card").count()
    page.close()


def test_every_control_is_reached_by_the_keyboard(browser, pages):
    page, _ = opened(browser, pages["preview"])
    wanted = page.evaluate("document.querySelectorAll('summary, button, a[href], [tabindex]').length")
    reached = set()
    for _ in range(wanted + 20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    hidden = page.evaluate(
        """[...document.querySelectorAll("summary, button, a[href], [tabindex]")]
        .filter(each => !each.checkVisibility()).length"""
    )
    assert len(reached) >= wanted - hidden
    page.close()


def test_a_long_conversation_unfolds_by_keys(browser, pages):
    page, _ = opened(browser, pages["preview"], viewport={"width": 390, "height": 844})
    folded = page.locator(".tokens details").first
    before = folded.bounding_box()["height"]
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    assert folded.bounding_box()["height"] > 3 * before
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_a_frame_with_its_slices_is_as_wide_as_they_are_and_enlarges(browser, pages):
    page, _ = opened(browser, pages["preview"], viewport={"width": 1280, "height": 844})
    figure = page.locator(".frames.sliced > figure").first
    frame, row = figure.locator("> .zoom img").bounding_box(), figure.locator(".tilesrow").first.bounding_box()
    assert abs(frame["width"] - row["width"]) <= 2
    assert row["y"] >= frame["y"] + frame["height"]
    figure.locator("> .zoom > summary").click()
    large = figure.locator("> .zoom img").bounding_box()
    assert large["width"] > 1.5 * frame["width"]
    assert abs(large["x"] + large["width"] / 2 - 640) <= 20, "in the middle"
    page.close()


def test_a_token_tells_its_id(browser, pages):
    page, _ = opened(browser, pages["preview"])
    token = page.locator(".tokens mark i").first
    assert token.get_attribute("title").split()[0].isdigit()
    link = page.locator(".tokens a").first
    assert page.locator(link.get_attribute("href")).count() == 1
    page.close()
