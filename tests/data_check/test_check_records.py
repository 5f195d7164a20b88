from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.data_check import check_records as checking
from finetune.data_check.check_records import CheckError, check, check_before_training, overlap
from finetune.data_check.check_report import CheckReport, normalized_message
from finetune.data_check.length_table import measure_lengths
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.encoding.sample_policy import SamplePolicy
from finetune.readers import read
from finetune.sample import DataError
from finetune.utils.cache import folder

Write = Callable[..., Path]
Make = Callable[..., Encoder]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minicpmv-finetune"


def look(path: Path, encoder: Encoder, policy: str = "shrink", **options: Any) -> CheckReport:
    return check(read(path), LengthPolicy(encoder, policy), **options)


def test_all_problems_at_once(write_records: Write, make_encoder: Make) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    path = write_records(
        "good.png",
        "page.jpg",
        "empty.png",
        "huge.png",
        "gone.png",
        "truncated.jpg",
        "cmyk.jpg",
        "sixteen.png",
        "palette.png",
        "animated.gif",
        None,
        {"id": "a", "conversations": "no list"},
        {"id": "b", "conversations": [{"role": "user", "content": 5}]},
        {"id": "c", "image": 7, "conversations": turns},
        [],
        {"id": "d", "conversations": turns[:1]},
    )
    report = look(path, make_encoder())
    assert (report.records, report.checked) == (16, 16)
    # The body of the truncated file is not read: training will find it.
    assert report.outcomes == {"kept": 7}
    for fault in (
        r"record 1 (id '1'): image {zoo}/page.jpg is a web page",
        r"record 2 (id '2'): image {zoo}/empty.png is empty",
        r"record 3 (id '3'): image {zoo}/huge.png has 10000 x 10000 = 100000000 pixels, the limit is 89478485",
        r"record 4 (id '4'): image '{zoo}/gone.png' does not exist",
        r"record 11 (id 'a'): 'conversations' is a string",
        r"record 12 (id 'b'): turn 0: 'content' is a number",
        r"record 13 (id 'c'): an image path is a number",
        r"record 14: is a list",
        r"record 15 (id 'd'): no answer",
    ):
        zoo = report.problems[0].partition("image ")[2].partition("/page.jpg")[0]
        assert sum(fault.format(zoo=zoo) in problem for problem in report.problems) == 1, fault
        assert fault.format(zoo=zoo) in str(report)
    assert len(report.problems) == 9
    assert str(report).count("\n  1 x ") == 9  # a problem that is alone in its kind is one line, with its place
    assert "x image PATH" not in str(report)


def test_first_five_of_each_kind_in_full(write_records: Write, make_encoder: Make) -> None:
    path = write_records(*["gone.png"] * 7, *["page.jpg"] * 2, "good.png")
    lines = str(look(path, make_encoder())).splitlines()
    heads = [line for line in lines if " x " in line]
    assert [line.split()[0] for line in heads] == ["7", "2"]
    assert sum("gone.png' does not exist" in line for line in lines) == 5
    assert "      ... and 2 more" in lines
    assert lines[1].strip() == "1 kept, 9 that cannot be used; longest 26 tokens" or lines[1].startswith("  1 kept, 9 ")


def test_lengths_are_reported_as_training_will_treat_them(write_records: Write, make_encoder: Make) -> None:
    image = {
        "image": [],
        "conversations": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "A."}],
    }
    path = write_records("whole.jpg", "good.png", image)
    report = look(path, make_encoder(40))
    assert report.outcomes == {"shrunk": 1, "kept": 1}
    assert len(report.overlong) == 1
    assert report.longest <= 40
    assert "1 skipped as too long" in str(report)
    assert re.search(r"record 2\b.*: skipped: \d+ tokens, the limit is 40, and its last exchange alone", str(report))
    assert len(look(path, make_encoder(40), "error").problems) == 2
    assert len(look(path, make_encoder(40), "drop").overlong) == 2
    assert look(path, make_encoder(40), "truncate").outcomes == {"kept": 1, "truncated": 1}


def test_dropped_images_are_named(write_records: Write, make_encoder: Make, zoo: Path) -> None:
    turns = [
        {"role": role, "content": text} for _ in range(3) for role, text in (("user", "What?" * 9), ("assistant", "A."))
    ]
    path = write_records({"image": str(zoo / "good.png"), "conversations": turns})
    report = look(path, make_encoder(45))
    assert (report.outcomes, report.lost_media) == ({"turns removed": 1}, 1)
    assert "warning: images, videos and audio in removed turns: 1; later" in str(report)


def test_duplicate_ids_are_a_warning(write_records: Write, make_encoder: Make) -> None:
    report = look(write_records(*[None] * 8, id="x"), make_encoder())
    assert report.duplicates == {"x": 8}
    assert not report.problems
    assert "warning: ids that occur more than once: 'x' (8)" in str(report)
    assert not look(write_records(*[None] * 8, id=None), make_encoder()).duplicates


def test_byte_order_mark_is_read(write_records: Write, make_encoder: Make) -> None:
    path = write_records("good.png")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert look(path, make_encoder()).outcomes == {"kept": 1}


def test_second_check_is_remembered_until_a_file_changes(
    write_records: Write, make_encoder: Make, tmp_path: Path, cache: Path
) -> None:
    Image.new("RGB", (60, 60)).save(tmp_path / "mine.png")
    path = write_records("good.png", str(tmp_path / "mine.png"), "gone.png")
    first = look(path, make_encoder(100))
    assert (first.reused, len(first.problems)) == (0, 1)
    assert folder() == cache
    second = look(path, make_encoder(100))
    assert (second.reused, len(second.problems)) == (2, 1)
    assert (second.outcomes, second.longest) == (first.outcomes, first.longest)
    assert "2 of them cached" in str(second)
    assert look(path, make_encoder(99)).reused == 0
    assert look(path, make_encoder(100), "drop").reused == 0
    assert look(path, make_encoder(100), rebuild=True).reused == 0
    assert check(read(path, train_on="last"), LengthPolicy(make_encoder(100), "shrink")).reused == 0
    (tmp_path / "mine.png").write_bytes(b"")
    third = look(path, make_encoder(100))
    assert (third.reused, len(third.problems)) == (1, 2)
    os.utime(path, ns=(1, 1))
    assert look(path, make_encoder(100)).reused == 0
    for file in cache.iterdir():
        file.write_text("{")
    assert look(path, make_encoder(100)).reused == 0


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    write_records: Write, make_encoder: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert look(write_records("good.png"), make_encoder()).outcomes == {"kept": 1}
    assert "are not cached" in caplog.text


def test_levels(write_records: Write, make_encoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_records(*[None] * 50)
    monkeypatch.setattr(checking, "SAMPLED", 10)
    assert look(path, make_encoder(), level="full").checked == 50
    assert look(path, make_encoder()).checked == 50
    assert look(path, make_encoder(), level="sample").checked == 10
    assert checking._chosen(50, "sample") == list(range(0, 50, 5))
    monkeypatch.setattr(checking, "FULL_UP_TO", 49)
    report = look(path, make_encoder())
    assert report.checked == 10
    assert "10 records of 50, evenly spaced" in str(report)
    with pytest.raises(ValueError, match="no level 'half'"):
        look(path, make_encoder(), level="half")


def sample_policy(path: Path, encoder: Encoder, policy: str = "error", overlong: str = "shrink") -> SamplePolicy:
    return SamplePolicy(read(path), encoder, overlong=overlong, on_bad_sample=policy)


def test_problems_stop_the_run_unless_they_are_skipped(
    write_records: Write, make_encoder: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train = write_records("good.png", "page.jpg", "gone.png")
    evaluation = write_records("good.png", "empty.png", name="eval.json")
    wanted = r"^3 records cannot be used, the first: .*data.json, record 1 .*page.jpg"
    with pytest.raises(CheckError, match=wanted):
        check_before_training([sample_policy(train, make_encoder()), sample_policy(evaluation, make_encoder())], None)
    for name in ("gone.png", "empty.png"):
        assert name in caplog.text
    assert "page.jpg" not in caplog.text, "the error says it"
    check_before_training([sample_policy(train, make_encoder(), "skip")], None)
    assert "data.json: 2 records will be skipped" in caplog.text
    check_before_training([sample_policy(train, make_encoder())], "off")


@pytest.mark.parametrize("level", ["full", "off"])
def test_a_data_set_without_a_usable_record(write_records: Write, make_encoder: Make, level: str) -> None:
    for image, overlong, limit in (("page.jpg", "shrink", None), (None, "drop", 3)):
        path = write_records(*[image] * 60)
        with pytest.raises(DataError, match=r"none of (the first 50|60) records can be used; the first.*record 0"):
            check_before_training([sample_policy(path, make_encoder(limit), "skip", overlong)], level)


def test_damage_behind_the_header_is_found_at_the_start_when_it_is_everywhere(
    write_records: Write, make_encoder: Make
) -> None:
    with pytest.raises(DataError, match="none of the first 2 records can be used.*truncated.jpg cannot be decoded"):
        check_before_training([sample_policy(write_records(*["truncated.jpg"] * 2), make_encoder(), "skip")], None)
    check_before_training([sample_policy(write_records("truncated.jpg", None), make_encoder(), "skip")], None)


def test_an_interrupt_passes(write_records: Write, make_encoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LengthPolicy, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        look(write_records(*[None] * 100), make_encoder())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "a b/c.json, record 3 (id 'it\\'s'): image /x y/1.png is not an image",
            "d.json, record 4: image z.png is not an image",
        ),
        (
            "a, record 3: image 'x' does not exist (looked for /a/x, /b/x)",
            "a, record 9 (id \"it's\"): image 'y' does not exist (looked for /a/y)",
        ),
        ("a, record 3: turn 1 has role 'x'", "a, record 5 (id 'x: y'): turn 22 has role \"it's\""),
    ],
)
def test_shape(one: str, other: str) -> None:
    assert normalized_message(one) == normalized_message(other)


def test_shape_keeps_names_and_tags() -> None:
    assert normalized_message("a, record 3: MiniCPM-V 4.6 takes 2 of 3") == "MiniCPM-V 4.6 takes N of N"
    assert (
        normalized_message("a, record 3: no answer behind </think> in d/x.png") == "no answer behind </think> in PATH"
    )
    unread = "a, record 3: the key '{}' is not read, but contains 'd/x.png'; call it 'image'"
    assert (
        normalized_message(unread.format("img_2")) == "the key 'img_N' is not read, but contains '...'; call it 'image'"
    )
    assert normalized_message(unread.format("picture")) != normalized_message(unread.format("photo"))
    assert normalized_message("a, record 3: <|im_end|> and <image/> stay") == "<|im_end|> and <image/> stay"


def answered(text: str, **record: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
    return {"conversations": turns, **record}


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("<box>10 20 30 1000</box>", None),
        ("<box>10 20 30</box>", "is not four numbers"),
        ("<box>10 20 30 1001</box>", "outside of 0 to 1000"),
        ("<box>-1 20 30 40</box>", "outside of 0 to 1000"),
        ("<box>0.1 0.2 0.3 0.4</box>", "is not an integer"),
        ("A dog.<|eot_id|>", "'<|eot_id|>', a control token"),
        ("<b>A dog</b>", None),
        ("<think>A dog?</think>\n", "is empty after </think>"),
    ],
)
def test_what_is_seldom_meant_is_told(write_records: Write, make_encoder: Make, text: str, note: str | None) -> None:
    report = look(write_records(answered(text), answered("A cat.")), make_encoder())
    assert list(report.notes.values()) == ([1] if note else [])
    assert all(note is not None and note in found for found in report.notes)
    assert ("warning: 1 of 2 records: " in str(report)) == (note is not None)


def test_one_answer_for_most_records(write_records: Write, make_encoder: Make) -> None:
    records = [answered("yes" if number % 3 else "no", id=str(number)) for number in range(20)]
    report = str(look(write_records(*records), make_encoder()))
    assert "warning: 13 of 20 records have the same last answer, 'yes'" in report
    assert "same last answer" not in str(look(write_records(*records[:19]), make_encoder()))


def test_repeated_records_are_told_by_what_they_hold(
    write_records: Write, make_encoder: Make, zoo: Path, tmp_path: Path
) -> None:
    shutil.copy(zoo / "good.png", tmp_path / "copy.png")
    for name in ("red", "blue"):  # of one size in bytes
        Image.new("RGB", (30, 30), name).save(tmp_path / f"{name}.bmp")
    own = [str(tmp_path / name) for name in ("copy.png", "red.bmp", "blue.bmp")]
    train = write_records("good.png", *own, "cmyk.jpg", None, name="train.json")
    evaluation = write_records("cmyk.jpg", answered("A cat."), name="eval.json")
    reports = [look(path, make_encoder()) for path in (train, evaluation)]
    assert [report.repeated for report in reports] == [1, 0]
    assert "warning: 1 of 6 records: duplicates" in str(reports[0])
    sample_policies = [sample_policy(path, make_encoder()) for path in (train, evaluation)]
    (line,) = overlap(sample_policies, reports)
    assert line == f"1 records have the same text and media in {train} and in {evaluation}"
    assert list(overlap(sample_policies[:1], reports[:1])) == []


def test_media_are_counted_by_record(write_records: Write, make_encoder: Make, zoo: Path) -> None:
    pair = {"image": [str(zoo / "good.png"), str(zoo / "good.png")], **answered("Two.")}
    assert "2 of 3 records have an image" in str(look(write_records("good.png", None, pair), make_encoder()))
    assert "none of 1 records has an image" in str(look(write_records(None), make_encoder()))


def test_lengths_are_those_of_other_settings(write_records: Write, make_encoder: Make, zoo: Path) -> None:
    Image.new("RGB", (300, 200)).save(zoo.parent / "wide.png")
    path = write_records(str(zoo.parent / "wide.png"), "good.png", None, "gone.png")
    encoder = make_encoder(64)
    found = measure_lengths(read(path), encoder)
    assert found is not None
    assert list(found.tokens) == [1, 2, 4, 6, 9]
    for slices, tokens in found.tokens.items():
        other = make_encoder()
        other.slicing = replace(other.slicing, max_slice_nums=slices)
        assert list(tokens) == [other.measure(read(path)[number]).tokens for number in range(3)]
    share = f"{100 * sum(found.tokens[9] > 64) / 3:.0f}%"
    row = next(line for line in str(found).splitlines() if line.split()[0] == "9*")
    assert row.split()[4] == share
    assert measure_lengths(read(write_records("gone.png")), encoder) is None


def test_keys_that_nothing_reads_are_one_line_with_their_numbers(write_records: Write, make_encoder: Make) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog.", "score": 1}]
    extra: list[dict[str, Any]] = [{"source": "x", "width": 3}, {"source": "y", "widht": 3}, {}]
    path = write_records(*({"conversations": turns, **more} for more in extra))
    report = str(look(path, make_encoder()))
    (line,) = (line for line in report.splitlines() if "keys that are not read" in line)
    assert line.startswith("  note: keys that are not read: 'source' (2 of 3 records), ")
    assert sorted(line.partition("'source' (2 of 3 records), ")[2].split(", ")) == [
        "'widht' (1 of 3 records)",
        "'width' (1 of 3 records)",
    ]
    assert "note: 3 of 3 records: keys of turns that are not read: 'score'" in report
