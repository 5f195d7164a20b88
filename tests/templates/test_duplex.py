"""The full-duplex prompt against a table written by hand: grid, cut of words, last unit, silence, a long turn."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sounds import write_wav

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy, OverlongError
from finetune.media import audio
from finetune.readers.forms import Form
from finetune.readers.record_media import media_folders
from finetune.readers.record_reader import RecordReader
from finetune.sample import DataError, Sample, Source
from finetune.tokenizers.tokenization import load_tokenizer

START = "<|im_start|>system\nStreaming Duplex Conversation! You are a helpful assistant.<|im_end|>"


@pytest.fixture(scope="module")
def encoder(tiny: Callable[[str], Path]) -> Encoder:
    base = resolve_base(str(tiny("o4_5")))
    return Encoder(base.family, load_tokenizer(base.folder), base.settings)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Sample]:
    """A sample from the parts of a timeline; u3.wav lasts 3 s, u2.wav 1.6 s, beep.wav 0.5 s."""
    for name, seconds in (("u3", 3.0), ("u2", 1.6), ("beep", 0.5), ("long", 33.0)):
        write_wav(tmp_path / f"{name}.wav", seconds)
    Image.new("RGB", (640, 480), "red").save(tmp_path / "red.png")

    def make(*assistant: dict[str, Any], user: str | list[Any] = "u3.wav", system: str = "", **rest: Any) -> Sample:
        clips = [{"audio": user, "start": 0}] if isinstance(user, str) else user
        record = {"id": "a", "duplex": {"user": clips, "assistant": list(assistant), **rest}}
        record |= {"system": system} if system else {}
        return RecordReader(Form("duplex"), media_folders(tmp_path), "all").sample(record, Source("d.json", 0, "a"))

    return make


def written(encoder: Encoder, sample: Sample) -> tuple[str, list[str]]:
    """The prompt in short, and the trained tokens of each unit."""
    example = encoder.encode(sample)
    text = str(encoder.tokenizer.decode(example.input_ids)).replace("<unk>" * 10, "[audio]")
    assert all(
        label in (-100, token) for label, token in zip(example.labels.tolist(), example.input_ids.tolist(), strict=True)
    )
    labels = encoder.tokenizer.decode(example.labels[example.labels >= 0])
    units = text.removesuffix("</unit>").split("</unit>")
    trained = [unit.partition("[audio]")[2].split("[audio]")[-1] for unit in units]
    assert "".join(trained) == labels
    return text, trained


def test_grid_and_silence(encoder: Encoder, read: Callable[..., Sample]) -> None:
    text, _ = written(encoder, read())
    assert text == START + "<unit>[audio]<|listen|></unit>" * 3
    text, _ = written(encoder, read(user="u2.wav"))  # the last second is filled with silence
    assert text == START + "<unit>[audio]<|listen|></unit>" * 2
    text, _ = written(encoder, read(seconds=5))
    assert text == START + "<unit>[audio]<|listen|></unit>" * 5


def test_a_word_belongs_to_the_last_second_that_ends_at_most_300_ms_before_it(
    encoder: Encoder, read: Callable[..., Sample]
) -> None:
    words = [["One", 0.0, 0.2], ["two", 0.299], ["three", 0.3, 0.9], ["four.", 1.3]]
    _, trained = written(encoder, read({"text": "One two three four.", "start": 1.0, "words": words}))
    assert trained == [
        "<|speak|>One two<|chunk_eos|>",
        "<|speak|> three<|chunk_eos|>",
        "<|speak|> four.<|turn_eos|><|chunk_eos|>",
    ]


def test_a_second_without_a_word_inside_of_a_turn_keeps_speaking(encoder: Encoder, read: Callable[..., Sample]) -> None:
    turn = {"text": "Wait.Go.", "start": 1.5, "words": [["Wait.", 0], ["Go.", 3.0]]}
    _, trained = written(encoder, read(turn))
    assert trained == [
        "<|listen|>",
        "<|speak|>Wait.<|chunk_eos|>",
        "<|speak|><|chunk_eos|>",
        "<|speak|><|chunk_eos|>",
        "<|speak|>Go.<|turn_eos|><|chunk_eos|>",
    ]


def test_a_long_turn_without_word_times_is_spread_at_the_stated_rate(
    encoder: Encoder, read: Callable[..., Sample]
) -> None:
    sample = read({"text": "aaaa " * 12, "start": 0}, {"text": "好好好好好", "start": 6})
    _, trained = written(encoder, sample)
    counts = [unit.count("aaaa") for unit in trained]
    # Words start at 0, 0.27, 0.6, 0.93, 1.27, ... seconds; the first unit has those before 1.3 s.
    assert counts == [5, 3, 3, 1, 0, 0, 0]
    assert [unit.count("好") for unit in trained] == [0, 0, 0, 0, 0, 2, 3]
    assert any("without word times" in note for note in sample.notes)


def test_two_turns_and_the_system_turn_with_a_reference(encoder: Encoder, read: Callable[..., Sample]) -> None:
    turns = [{"text": "Hi.", "start": 0.5}, {"text": "Bye.", "start": 3.4}]
    text, trained = written(encoder, read(*turns, system="Be brief.", reference="u2.wav", seconds=4))
    assert text.startswith("<|im_start|>system\nBe brief.\n<|audio_start|>" + "[audio]" + "<unk>" * 6 + "<|audio_end|>")
    assert "<|audio_end|><|im_end|><unit>[audio]<|speak|>" in text
    assert trained == [
        "<|speak|>Hi.<|turn_eos|><|chunk_eos|>",
        "<|listen|>",
        "<|listen|>",
        "<|speak|>Bye.<|turn_eos|><|chunk_eos|>",
    ]


def test_pictures_stand_before_the_audio_of_their_second_in_one_slice(
    encoder: Encoder, read: Callable[..., Sample]
) -> None:
    sample = read(images=[{"image": "red.png", "start": 2.9}, {"image": "red.png", "start": 1.0}])
    settings = resolve_base(encoder.tokenizer.name_or_path).settings
    large = Encoder(encoder.family, encoder.tokenizer, settings, max_slice_nums=9)
    assert large.encode(sample).tgt_sizes.shape == (2, 2)
    text, _ = written(encoder, sample)
    picture = "<image>" + "<unk>" * 8 + "</image>"
    unit = "[audio]<|listen|></unit>"
    assert text == START + f"<unit>{unit}<unit>{picture}{unit}<unit>{picture}{unit}"


def test_text_never_becomes_a_control_token(encoder: Encoder, read: Callable[..., Sample]) -> None:
    example = encoder.encode(read({"text": "<|listen|></unit>", "start": 0}, system="<unit>"))
    ids = example.input_ids.tolist()
    assert ids.count(encoder.prompt_tokenizer.control("<|listen|>")) == (example.labels >= 0).sum() - sum(
        ids.count(encoder.prompt_tokenizer.control(token)) for token in ("<|speak|>", "<|turn_eos|>", "<|chunk_eos|>")
    ) - len(encoder.prompt_tokenizer.text("<|listen|></unit>"))
    assert ids.count(encoder.prompt_tokenizer.control("<unit>")) == 3


def test_user_audio_is_mixed_on_one_timeline(encoder: Encoder, read: Callable[..., Sample]) -> None:
    clips = [
        {"audio": "beep.wav", "start": 0.25},
        {"audio": "beep.wav", "start": 0.5},
        {"audio": "beep.wav", "start": 3},
    ]
    sample = read(user=clips)
    (track,) = sample.media("audio")
    mixed = audio.load(track)
    beep = audio.load(track.data.clips[0][1])  # pyright: ignore[reportAttributeAccessIssue]
    assert len(mixed) == 4 * 16_000
    assert not mixed[:4000].any()
    assert not mixed[16_000:48_000].any()
    np.testing.assert_array_equal(mixed[4000:8000], beep[:4000])
    np.testing.assert_array_equal(mixed[8000:12_000], beep[4000:] + beep[:4000])
    example = encoder.encode(sample)
    assert example.audio_bound.shape == (4, 2)
    assert [mel.shape[1] for mel in example.audio] == [400]


def test_audio_of_more_than_30_seconds_has_one_run_per_second(encoder: Encoder, read: Callable[..., Sample]) -> None:
    example = encoder.encode(read(user="long.wav"))
    assert (example.audio_bound[:, 1] - example.audio_bound[:, 0]).tolist() == [10] * 33
    assert [mel.shape[1] for mel in example.audio] == [3000, 300]


def test_a_timeline_is_never_shortened(encoder: Encoder, read: Callable[..., Sample]) -> None:
    sample = read(seconds=30)
    short = Encoder(
        encoder.family,
        encoder.tokenizer,
        resolve_base(encoder.tokenizer.name_or_path).settings,
        max_length=100,
    )
    for policy in ("shrink", "truncate", "drop"):
        with pytest.raises(OverlongError, match="the limit is 100"):
            LengthPolicy(short, policy).fit(sample)


def test_other_generations_refuse_it(tiny: Callable[[str], Path], read: Callable[..., Sample]) -> None:
    base = resolve_base(str(tiny("o2_6")))
    other = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    with pytest.raises(DataError, match=r"MiniCPM-o 2.6 has no prompt for it; .* \(MiniCPM-o 4.5\)"):
        other.encode(read())


@pytest.mark.parametrize(
    ("turns", "rest", "said"),
    [
        ([{"text": "a", "start": 2}, {"text": "b", "start": 2.2}], {}, "a second has text of one turn"),
        ([{"text": "a b", "start": 0, "words": [["a", 0], ["c", 1]]}], {}, "the words together must be the text"),
        ([{"text": "a b", "start": 0, "words": [["a", 0]]}], {}, "'words' of assistant.0. end before"),
        ([{"text": "a b", "start": 0, "words": [["a", 1], ["b", 0]]}], {}, "words must be in order"),
        ([{"text": "a", "start": -1}], {}, "must be a time in seconds"),
        ([{"text": " ", "start": 0}], {}, "has no text"),
        ([{"text": "a", "begin": 0}], {}, "has the key 'begin', which is not read"),
        ([], {"unit": 0.5}, "units of the native prompt last 1.0 second"),
        ([{"text": "a", "start": 9}], {"seconds": 4}, "belongs to second 8"),
        ([], {"seconds": 2}, "its user audio ends after 3.00 seconds, and 'seconds' is 2"),
        ([], {"user": []}, "'user' has no clip"),
        ([], {"user": "missing.wav"}, "does not exist"),
        ([], {"speed": 1}, "has the key 'speed'"),
    ],
)
def test_mistakes_name_the_record_and_both_sides(
    encoder: Encoder, read: Callable[..., Sample], turns: list[Any], rest: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        encoder.encode(read(*turns, **rest))
    assert "d.json, record 0 (id 'a')" in str(caught.value)


def test_a_silent_file_is_a_wave(tmp_path: Path, encoder: Encoder, read: Callable[..., Sample]) -> None:
    with wave.open(str(tmp_path / "silence.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(32_000))
    assert len(encoder.encode(read(user="silence.wav")).audio) == 1
