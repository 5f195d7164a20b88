"""preview.html shows what the model gets, of the samples that matter, and nothing in the data can act on it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import number, write_clip
from page_reading import Page, assert_safe
from PIL import Image
from sounds import write_wav
from zoo import gradient

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.commands.check import main
from finetune.data_check.check_records import check
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.media import image
from finetune.media.video_sampling import VideoOptions
from finetune.models import load_tokenizer
from finetune.pages import data_preview
from finetune.pages.data_preview import write_preview
from finetune.pages.decoded_prompt import prompt_parts
from finetune.pages.model_view import model_views
from finetune.pages.prompt_sections import prompt_sections
from finetune.pages.record_survey import CheckedDataset, RecordSurvey, choose
from finetune.readers.mixture import open_data

EVIL = "<script>alert('x')</script>&\"<img src=http://example.com/x.png onerror=a()>'\x1b[31m\u202e\x07\x00</style>"
FAMILIES = ("v2_0", "llama3_v2_5", "v2_6", "v4_5", "v4_6")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def encoder_of(tiny: Callable[[str], Path]) -> Callable[..., Encoder]:
    def make(name: str, max_length: int | None = None) -> Encoder:
        base = resolve_base(str(tiny(name)))
        return Encoder(base.family, load_tokenizer(base.folder), base.settings, max_length=max_length)

    return make


def record(id: str, *turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"id": id, "conversations": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)], **more}


def surveyed(path: Path, records: list[dict[str, Any]], encoder: Encoder, policy: str = "shrink") -> CheckedDataset:
    path.write_text(json.dumps(records))
    samples, length_policy, survey = open_data(path, None), LengthPolicy(encoder, policy), RecordSurvey()
    return CheckedDataset(samples, length_policy, check(samples, length_policy, "full", seen=survey.update), survey)


def page_of(tmp_path: Path, *parts: CheckedDataset, most: int = 50) -> tuple[str, Page]:
    write_preview(tmp_path / "page.html", parts, most=most)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    return text, assert_safe(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_conversation_is_that_of_the_ids(family, encoder_of, tmp_path):
    """Every token is shown once, in order, whatever the tokenizer makes of it; what is trained is what has a label."""
    gradient(1344, 1008).save(tmp_path / "a.png")
    question, answer = "<image>\nWas zeigt 你好 das  Bild\n\n🙂?", "Ein  Verlauf\nmit 🙂 <box>1 2 3 4</box>."
    given = record("a", question, "Ja. ", "Und  jetzt?", answer, image=str(tmp_path / "a.png"))
    encoder = encoder_of(family)
    part = surveyed(tmp_path / "data.json", [given], encoder)
    fitted = part.length_policy.fit(part.records[0])
    shown, ids, labels = list(prompt_parts(encoder, fitted)), fitted.rendered.input_ids, fitted.rendered.labels
    (medium,) = [place for place, piece in enumerate(shown) if piece.medium is not None]
    before = [number for piece in shown[:medium] for number in piece.ids]
    behind = [number for piece in shown[medium + 1 :] for number in piece.ids]
    assert ids[: len(before)] == before
    assert ids[-len(behind) :] == behind
    (first, _), (_, last) = fitted.rendered.image_bounds[0], fitted.rendered.image_bounds[-1]
    closing = 2 if family in ("v2_0", "llama3_v2_5") else 1  # </image></slice>, or </slice>
    assert (len(before), len(ids) - len(behind)) == (first - 1, last + closing)
    tokens = sum(end - start for start, end in fitted.rendered.image_bounds)
    slices = len(fitted.rendered.image_bounds) - 1
    assert shown[medium].text == f"[image 1344x1008: 1 + {slices} slices, {tokens} tokens]"
    trained = [number for piece in shown if piece.trained for number in piece.ids]
    assert len(trained) == sum(label != -100 for label in labels)
    text = "".join(piece.text for piece in shown if piece.trained)
    assert "Ein  Verlauf\nmit 🙂" in text
    assert "zeigt" not in text
    assert "Was zeigt 你好 das  Bild\n\n🙂?" in "".join(piece.text for piece in shown)


def test_a_full_duplex_record_is_a_timeline(encoder_of, tmp_path):
    write_wav(tmp_path / "a.wav", 3)
    gradient(60, 60).save(tmp_path / "a.png")
    spoken = {"text": "One <b>two</b>.", "start": 1.5, "words": [["One", 0], ["<b>two</b>.", 1]]}
    given = {"user": [{"audio": "a.wav", "start": 0}], "assistant": [spoken]}
    given["images"] = [{"image": "a.png", "start": 2}]
    part = surveyed(tmp_path / "data.json", [{"id": "a", "duplex": given}], encoder_of("o4_5"))
    text, seen = page_of(tmp_path, part)
    assert [each["class"] for each in seen.of("div") if each.get("class") in ("listen", "speak")] == [
        "listen",
        "speak",
        "speak",
    ]
    words = "".join(seen.text.split())
    assert "0slistens1sbeginsOne2sgoesonandends1picture<b>two</b>." in words
    assert seen.text.count("[user audio 1 to 2 s: 10 tokens]") == 2  # conversation and its ids
    assert len(seen.of("polygon")) == 2  # timeline and media


@pytest.mark.parametrize("family", ["v2_6", "v4_6"])
def test_pictures_are_those_of_the_tensors(family, encoder_of, tmp_path):
    gradient(900, 500).save(tmp_path / "a.png")
    encoder = encoder_of(family)
    part = surveyed(tmp_path / "data.json", [record("a", "<image>?", "A", image=str(tmp_path / "a.png"))], encoder)
    fitted = part.length_policy.fit(part.records[0])
    (seen,) = model_views(encoder, fitted)
    plan: Any = fitted.plans[0]
    assert seen.grid == plan.grid
    wanted = image.slice_image(gradient(900, 500), plan)
    assert len(seen.items) == len(wanted) == plan.items > 1
    for shown, cut in zip(seen.items, wanted, strict=True):
        # The published processors resize by rules of their own.
        assert np.abs(np.asarray(shown).astype(int) - cut[..., :3]).max() <= (0 if family == "v2_6" else 3)


def test_frames_have_their_times_and_sound_its_wave(encoder_of, tmp_path):
    write_clip(tmp_path / "a.mp4", 10, fps=4)
    write_wav(tmp_path / "a.wav", 1.5)
    turns = {"messages": [{"role": "user", "content": "<video>?<audio>!"}, {"role": "assistant", "content": "A."}]}
    encoder = encoder_of("o2_6")
    given = {**turns, "videos": [str(tmp_path / "a.mp4")], "audios": [str(tmp_path / "a.wav")]}
    part = surveyed(tmp_path / "data.json", [given], encoder)
    video, sound = model_views(encoder, part.length_policy.fit(part.records[0]))
    assert [(frame.second, number(frame.picture)) for frame in video.frames] == [(0, 0), (1, 4), (2, 8)]
    assert (sound.seconds, sound.words[:13]) == (1.5, "[audio 1.5 s:")
    heights = [float(point.split(",")[1]) for point in sound.wave.split()]
    assert min(heights) == pytest.approx(2, abs=1)
    assert max(heights) == pytest.approx(98, abs=1)
    text, seen = page_of(tmp_path, part)
    assert len(seen.of("polygon")) == 1
    assert [each for each in ("0.0 s", "1.0 s", "2.0 s") if each in seen.text] == ["0.0 s", "1.0 s", "2.0 s"]
    assert seen.text.count("[video 64x48, 2.5 s: 3 frames") == 3  # conversation, its ids, picture


def test_nothing_of_the_data_acts_on_the_page(encoder_of, tmp_path):
    gradient().save(tmp_path / "a<b>'&.png")
    evil = [
        record(EVIL, f"<image>\n{EVIL}", EVIL, image=str(tmp_path / "a<b>'&.png")),
        record("gone", EVIL, "B", image=EVIL),
        record("odd", "\ud800"),
    ]
    part = surveyed(tmp_path / "<i>data.json", evil, encoder_of("llama3_v2_5"))
    text, seen = page_of(tmp_path, part)
    assert "alert('x')" in seen.text
    assert r"\x1b" in seen.text
    assert r"\u202e" in seen.text
    assert len(seen.of("script")) == 1
    assert len(seen.of("img")) == 2
    assert " × " not in seen.text  # two problems of different kinds
    assert "record 1 (id 'gone')" in seen.text


def test_every_kind_that_matters_is_shown(encoder_of, tmp_path):
    long = "word " * 120
    plain = [record(str(place), f"What is {place}?", "It is.") for place in range(40)]
    dropped = record("dropped", *([f"{long}?", "Yes."] * 6))
    encoder = encoder_of("llama3_v2_5", 400)
    part = surveyed(tmp_path / "data.json", [*plain, dropped, record("answer", "?", "word " * 60)], encoder)
    chosen = choose([part], 8, seed=1)
    assert len(chosen) == 8
    reasons = [reason for found in chosen.values() for reason in found]
    assert {"first in the form official", "turns removed", "longest", "longest answers", "random"} <= set(reasons)
    assert chosen == choose([part], 8, seed=1)
    assert chosen != choose([part], 8, seed=2)
    text, seen = page_of(tmp_path, part, most=8)
    assert "turns removed from the beginning" in seen.text
    assert len(seen.of("article")) == 8
    assert "limit" not in seen.text or "400" in seen.text


def test_a_filter_counts_the_samples_that_it_shows(encoder_of, tmp_path):
    """Also those of a frequent warning, of which only the first few are chosen for it."""
    gradient().save(tmp_path / "a.png")
    given = [record(str(n), "What is <|im_end|>?", "It is.", image=str(tmp_path / "a.png")) for n in range(6)]
    given += [record("plain", "What?", "It is.")]
    text, seen = page_of(tmp_path, surveyed(tmp_path / "data.json", given, encoder_of("v2_6")))
    tags = [json.loads(card["data-tags"] or "") for card in seen.of("article")]
    filters = {button["value"]: button for button in seen.of("button") if button.get("value")}
    assert "first of a kind" in filters
    for word in filters:
        shown = sum(word in own for own in tags)
        assert f"{word} {shown}\n" in seen.text, word
    assert sum("warning" in own for own in tags) == 6


@pytest.mark.parametrize("policy", ["shrink", "truncate"])
def test_what_had_to_give_is_said(policy, encoder_of, tmp_path):
    gradient(900, 900).save(tmp_path / "a.png")
    encoder = encoder_of("llama3_v2_5")
    given = [record("a", f"<image>\n{'word ' * 40}", "Yes.", image=str(tmp_path / "a.png"))]
    whole = surveyed(tmp_path / "data.json", given, encoder).report.longest
    short = encoder_of("llama3_v2_5", whole - 10)
    text, seen = page_of(tmp_path, surveyed(tmp_path / "data.json", given, short, policy))
    said = {"shrink": "images cut into", "truncate": "truncated from a user turn"}[policy]
    assert said in seen.text


def test_records_that_are_alike(encoder_of, tmp_path):
    """By what their files hold, not by their names; of both sides of an evaluation."""
    gradient().save(tmp_path / "a.png")
    gradient().save(tmp_path / "b.png")
    other = Image.new("RGB", (64, 48))
    other.save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes((tmp_path / "c.png").read_bytes()[:-1] + b"\x00")
    encoder = encoder_of("llama3_v2_5")

    def asked(id: str, name: str, question: str = "What?") -> dict[str, Any]:
        return record(id, f"<image>{question}", "It.", image=str(tmp_path / name))

    train = [asked("1", "a.png"), asked("2", "b.png"), asked("3", "c.png"), asked("4", "a.png", "Why?")]
    parts = [
        surveyed(tmp_path / "train.json", train, encoder),
        surveyed(tmp_path / "eval.json", [asked("9", "c.png"), asked("8", "a.png", "Who?")], encoder),
    ]
    found = [each.places for each in data_preview.duplicates.find(parts)]
    assert [[place.rpartition("id ")[2] for place in places] for places in found] == [
        ["'3')", "'9')"],
        ["'1')", "'2')"],
    ]
    text, seen = page_of(tmp_path, *parts)
    assert "1 group is in several data sets" in seen.text


def test_a_duplicate_without_a_question_is_named_by_what_the_model_says(encoder_of, tmp_path):
    write_wav(tmp_path / "a.wav", 2)
    spoken = {"user": [{"audio": str(tmp_path / "a.wav"), "start": 0}], "assistant": [{"text": "Hello.", "start": 1}]}
    later = {**spoken, "assistant": [{"text": "Hello.", "start": 3}]}
    records = [{"id": name, "duplex": value} for name, value in (("1", spoken), ("2", spoken), ("3", later))]
    [found] = data_preview.duplicates.find([surveyed(tmp_path / "train.json", records, encoder_of("o4_5"))])
    assert (len(found.places), found.text) == (2, "Hello.")


def test_the_page_keeps_to_its_size(encoder_of, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    given = [record(str(n), f"<image>{n}", "word " * 500, image=str(tmp_path / "a.png")) for n in range(3)]
    part = surveyed(tmp_path / "data.json", given, encoder_of("v2_6"))
    sizes = []
    for room in (4_600_000, 150_000, 30_000, 6_000):
        monkeypatch.setattr(data_preview, "_ROOM", room)
        text, seen = page_of(tmp_path, part)
        sizes.append(len(text))
        assert (seen.text.count("word") >= 1500) == (room > 6_000), "pictures give way before text does"
        assert ("not on this page, to keep it small" in seen.text) == (room == 6_000)
    assert sizes[2] < sizes[1] < sizes[0] / 3
    assert sizes[1] < 200_000
    assert "more not shown, to keep this page small" in seen.text


def test_a_huge_text_is_shortened_and_the_rest_counted(encoder_of, tmp_path):
    """Both ends are visible, more unfolds, and what is not on the page is told."""
    huge = "".join(f"line {n} <&> " for n in range(80_000))
    given = [record("a", "BEGIN " + huge, huge + " END"), *(record(str(n), "What?", "It.") for n in range(49))]
    text, seen = page_of(tmp_path, surveyed(tmp_path / "data.json", given, encoder_of("llama3_v2_5")))
    assert len(text.encode()) < 500_000 < len(huge)
    told = re.search(r"Show all: ([\d,]+) more tokens here, and ([\d,]+) tokens that are not on this page", seen.text)
    assert told is not None
    hidden, gone = (int(each.replace(",", "")) for each in told.groups())
    assert gone > 500_000 > hidden > 1000
    assert f"[{told[2]} tokens not shown]" in seen.text
    assert "BEGIN" in seen.text
    assert " END" in seen.text


def test_of_ten_megabytes_both_ends_are_decoded(encoder_of, tmp_path):
    """Tokens of 10 MB, not made from text, which would take long: each is on the page or counted, none is both."""
    encoder = encoder_of("llama3_v2_5")
    part = surveyed(tmp_path / "data.json", [record("a", "What <is> & it?", "That.\n")], encoder)
    fitted = part.length_policy.fit(part.records[0])
    once, times = fitted.rendered, 10_000_000 // len("What <is> & it?That.\n")
    ids, labels = once.input_ids * times, once.labels * times
    fitted = replace(fitted, rendered=replace(once, input_ids=ids, labels=labels))
    made = prompt_sections(encoder, fitted, 46_000)
    assert 40_000 < made.spent <= 46_000
    shown = [piece for runs in made.sections for _, pieces in runs for piece in pieces]
    assert sum(piece.tokens for piece in shown) + made.left_out == len(ids)
    (gap,) = [one for one, other in itertools.pairwise(shown) if other.first != one.first + one.tokens]
    before = gap.first + gap.tokens
    seen = [number for piece in shown for number in piece.ids]
    assert seen == [*ids[:before], *ids[before + made.left_out :]]


def test_a_long_text_is_folded_and_complete(encoder_of, tmp_path):
    long = " ".join(f"w{n}" for n in range(1500))
    part = surveyed(tmp_path / "data.json", [record("a", "?", long)], encoder_of("llama3_v2_5"))
    text, seen = page_of(tmp_path, part)
    assert "Show all: " in seen.text
    assert "not on this page" not in seen.text
    inside = text.partition('<details class="more"><summary>Show all')[2].partition("</details>")[0]
    assert 0 < len(inside) < len(text)
    assert "w1499" not in inside
    words = re.sub(
        r"<summary>.*</summary>|<[^>]*>", "", text.partition('<div class="tokens"')[2].partition("</div>")[0]
    )
    assert [f"w{n}" for n in range(1500) if not re.search(rf"w{n}(?!\d)", words)] == []


def test_removed_text_is_shortened_too(encoder_of, tmp_path):
    encoder = encoder_of("llama3_v2_5", 400)
    turns = ["x " * 400_000, "Yes."] + ["Why?", "So."]
    text, seen = page_of(tmp_path, surveyed(tmp_path / "data.json", [record("a", *turns)] * 8, encoder))
    assert "turn removed from the beginning" in seen.text or "turns removed from the beginning" in seen.text
    assert "more characters not shown, to keep this page small" in seen.text
    assert len(text) < 5_000_000


@pytest.mark.parametrize("family", ["v2_6", "v4_5", "v4_6"])
def test_a_frame_that_is_cut_has_its_slices(family, encoder_of, tmp_path, tiny):
    """In groups too, where the model gets the frames of a group first and then their slices."""
    write_clip(tmp_path / "a.mp4", 8, fps=4, size=(320, 160))
    base = resolve_base(str(tiny(family)))
    options = VideoOptions(max_slice_nums=4, max_frames=3)
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings, video=options)
    turns = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "A."}]
    part = surveyed(tmp_path / "data.json", [{"messages": turns, "videos": [str(tmp_path / "a.mp4")]}], encoder)
    (seen,) = model_views(encoder, part.length_policy.fit(part.records[0]))
    assert seen.grid is not None
    columns, rows = seen.grid
    assert len(seen.frames) > 1
    for frame in seen.frames:
        assert len(frame.slices) == columns * rows > 1
        # Together they are the frame: alike once they have the same size.
        width, height = frame.slices[0].size
        whole = Image.new("RGB", (columns * width, rows * height))
        for place, each in enumerate(frame.slices):
            whole.paste(each, (place % columns * width, place // columns * height))
        small = [np.asarray(each.resize((32, 16), Image.Resampling.BOX)).astype(int) for each in (whole, frame.picture)]
        assert np.abs(small[0] - small[1]).mean() < 6
    text, page = page_of(tmp_path, part)
    assert text.count("Slice of the frame at") == columns * rows * len(seen.frames)
    assert "each frame as a whole and in slices" in page.text


def test_the_command_writes_it(tiny, tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps([record("a", "What?", "It.")]))
    command = ["--model", str(tiny("llama3_v2_5")), "--data", str(tmp_path / "data.json")]
    assert main([*command, "--html", str(tmp_path / "page.html"), "--samples", "1"]) == 0
    assert "What the model sees of data.json" in assert_safe((tmp_path / "page.html").read_text()).text
    assert main([*command, "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
