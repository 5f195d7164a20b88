"""Malformed records of every form: each is refused by name, or is one of the accepted kinds stated here."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from golden_tokenizers import SMALL_IMAGES, tokenizer
from malformed_inputs import VALUES, changed, guarded, json_texts, places, records, replaced

from finetune.data_check.check_records import check
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.encoding.sample_policy import SamplePolicy
from finetune.families import by_name
from finetune.readers import read
from finetune.readers.record_reader import SampleFile
from finetune.sample import DataError
from finetune.utils.errors import UserError

CHANGES = 400

# Read as they stand: JSON as Python writes it, labels that mean nothing to training, text that is only strange.
ACCEPTED = {
    "1e999",
    "NaN",
    "a mark in front",
    "a zero in the text",
    "half a pair in a key",
    "a field nested deeply",
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    made = Encoder(by_name("llama3_v2_5"), tokenizer("llama3"), SMALL_IMAGES, max_length=400)
    made.prompt_tokenizer.fixed("assistant")
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(folder: Path, *given: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(given), encoding="utf-8")
    return path


def take_all(samples: SampleFile, encoder: Encoder, policy: str = "skip") -> SamplePolicy:
    """Every record met as training, with its checks, meets it."""
    sample_policy = SamplePolicy(samples, encoder, overlong="shrink", on_bad_sample=policy)
    report = check(samples, sample_policy.length_policy)
    assert "\x1b" not in str(report)
    str(report).encode()
    for index in range(len(samples)):
        sample_policy.example(index)
    return sample_policy


@pytest.mark.parametrize("name", json_texts())
def test_json_files(name: str, tmp_path: Path, encoder: Encoder) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(json_texts()[name])
    if name in ACCEPTED:
        assert take_all(read(path), encoder, "error").totals() == (1, 0)
        return
    with pytest.raises(UserError, match="data.json") as caught:
        take_all(read(path), encoder, "error")
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("form", ["official", "official tags", "sharegpt", "openai", "alpaca"])
def test_every_value_replaced_by_every_other(form: str, tmp_path: Path, encoder: Encoder) -> None:
    """Thousands of records in one file a form: skip leaves out those that cannot be used, and nothing else escapes."""
    good = records(tmp_path)[form]
    made = [replaced(good, path, value) for path in places(good) for value in VALUES]
    samples = SampleFile(made, tmp_path / "data.json", read(written(tmp_path, good)).reading)
    escapes = [
        guarded(json.dumps(each)[:300], partial(samples.__getitem__, index), (UserError,))
        for index, each in enumerate(made)
    ]
    assert [each for each in escapes if each] == []
    sample_policy = take_all(SampleFile(made[::7], tmp_path / "data.json", samples.reading), encoder)
    taken, bad = sample_policy.totals()
    assert taken == len(made[::7])
    assert 0 < bad < taken


@pytest.mark.parametrize("form", ["official", "official tags", "sharegpt", "openai", "alpaca", "sound"])
def test_changed_records(form: str, tmp_path: Path) -> None:
    """Several changes at once, and the form told from such records."""
    good, random = records(tmp_path)[form], Random(form)
    reading = read(written(tmp_path, good)).reading
    escapes = []
    for number in range(CHANGES):
        given = changed(good, random)
        source = SampleFile([given], tmp_path / "data.json", reading)
        escapes.append(guarded(json.dumps(given)[:300], lambda source=source: source[0], (UserError,)))
        if number % 8 == 0:
            path = written(tmp_path, *(changed(good, random) for _ in range(3)))
            escapes.append(guarded(path.read_text()[:900], lambda path=path: list(read(path)), (UserError,)))
    assert [each for each in escapes if each] == []


def test_a_bad_record_is_named_and_left_out_alone(tmp_path: Path, encoder: Encoder) -> None:
    """Kinds that once ended everything: each names file and record, and skip leaves out that record only."""
    good = records(tmp_path)["official"]
    turns = good["conversations"]
    (tmp_path / "closed").mkdir(mode=0)
    made = [
        good,
        {"id": "a", "conversations": [turns[0] | {"content": "\ud83d"}, turns[1]]},
        {"id": "b", "conversations": [turns[0] | {"content": "Q"}, turns[1] | {"content": "An \udc00 it is"}]},
        good | {"image": "a" * 300},
        good | {"image": "a/" * 2500},
        good | {"image": "closed/a.png"},
        good | {"image": "\ud83d.png"},
        good | {"image": "iVBORw0KGgo" * 100},
        good | {"id": "a" * 1_000_000, "image": "no.png"},
        good | {"image": "no\x1b[31m.png"},
        good,
    ]
    path = written(tmp_path, *made)
    path.write_text(path.read_text().replace("[{", '[{"id": ' + "7" * 5000 + "}, {", 1))
    samples = read(path)
    sample_policy = take_all(samples, encoder)
    assert sample_policy.totals() == (12, 10)
    for index in [0, *range(2, 11)]:
        with pytest.raises(DataError, match=rf"data.json, record {index}\b") as caught:
            samples[index]
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) < 1200
    with pytest.raises(DataError, match=r"turn 1 \(assistant\): character 3 is half of a surrogate pair"):
        samples[3]
    with pytest.raises(DataError, match=r"an image inside the record \(825 bytes\) is not an image"):
        samples[8]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": [{"role": "user", "content": "Q"}]}, "has 'conversations' and 'messages', two lists of turns"),
        ({"conversations": [{"role": "user", "from": "gpt", "content": "Q"}]}, "turn 0 has 'role' and 'from'"),
    ],
)
def test_what_is_said_twice(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    good = {name: value for name, value in records(tmp_path)["official"].items() if name != "image"}
    with pytest.raises(DataError, match=rf"record 0 \(id '1'\): {words}"):
        read(written(tmp_path, good | change))[0]


def test_an_empty_list_of_parts(tmp_path: Path) -> None:
    good = records(tmp_path)["openai"]
    with pytest.raises(DataError, match="turn 0: 'content' is an empty list"):
        read(written(tmp_path, good, replaced(good, ("messages", 0, "content"), [])))[1]


def test_strict_paths(tmp_path: Path, encoder: Encoder) -> None:
    inside, outside = tmp_path / "data", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    good = records(inside)["official"]
    records(outside)
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "frames").mkdir()
    (inside / "frames" / "0.png").symlink_to(outside / "a.png")
    path = written(
        inside, good, *(good | {"image": name} for name in ("../elsewhere/a.png", str(outside / "a.png"), "link.png"))
    )
    assert take_all(read(path), encoder).totals() == (4, 0)
    assert take_all(read(path, strict_paths=True), encoder).totals() == (4, 3)
    assert take_all(read(path, strict_paths=True, image_root=outside), encoder).totals() == (4, 0)
    with pytest.raises(DataError, match=r"a.png, outside of .*data, which --strict_paths refuses"):
        read(path, strict_paths=True)[3]
    film = {
        "video": "frames",
        "conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    }
    path = written(inside, film)
    assert read(path)[0].messages
    with pytest.raises(DataError, match="--strict_paths"):
        read(path, strict_paths=True)[0]


def test_text_that_cannot_fit_is_not_tokenised(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lower bound refuses it; of a long conversation each text is spelled at most once."""
    spelled: list[int] = []
    plain = type(encoder.prompt_tokenizer).text

    def counting(self: Any, text: str) -> list[int]:
        spelled.append(len(text))
        return plain(self, text)

    monkeypatch.setattr(type(encoder.prompt_tokenizer), "text", counting)
    turns = [{"role": "user", "content": "What is it? " * 4}, {"role": "assistant", "content": "A dog. " * 4}]
    long = {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "word " * 400_000}]}
    samples = read(written(tmp_path, {"conversations": turns * 300}, long))
    fitted = LengthPolicy(encoder, "shrink").fit(samples[0])
    assert fitted.outcome == "turns removed"
    assert len(fitted.rendered.input_ids) <= 400
    assert sum(spelled) <= sum(len(turn["content"]) for turn in turns * 300)
    spelled.clear()
    with pytest.raises(DataError, match="skipped: at least [0-9]+ tokens by the length of its text, the limit is 400"):
        LengthPolicy(encoder, "shrink").fit(samples[1])
    assert sum(spelled) == 0
