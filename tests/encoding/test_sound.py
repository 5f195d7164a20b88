"""Sound becomes log-mel frames and as many placeholders as the network makes tokens."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sounds import tone, write_wav

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.collate import pad
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.encoding.log_mel import log_mel
from finetune.families import by_name, usable
from finetune.media.audio_layout import AudioSpec, plan_audio
from finetune.models import MiniCPMO, load_model, load_tokenizer
from finetune.readers import read
from finetune.sample import DataError, Media, Message, Part, Sample, Source, Text

OMNI = ("o2_6", "o4_5")
HEARING = {"o2_6": AudioSpec(pool_step=2, run_seconds=1.0), "o4_5": AudioSpec(pool_step=5)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ready(tiny) -> Callable[[str], tuple[MiniCPMO, Encoder]]:
    """Network and encoder by family, loaded once."""
    made: dict[str, tuple[MiniCPMO, Encoder]] = {}

    def make(family: str) -> tuple[MiniCPMO, Encoder]:
        if family not in made:
            base = resolve_base(str(tiny(family)))
            model = load_model(base.folder)
            assert isinstance(model, MiniCPMO)
            made[family] = model.eval(), Encoder(base.family, load_tokenizer(base.folder), base.settings)
        return made[family]

    return make


def talk(*question: str | np.ndarray | Image.Image, answer: str = "A tone.") -> Sample:
    """One question of texts, sounds and pictures, and its answer."""
    return Sample("x", Source("data.json", 3), (asked(*question), Message("assistant", (Text(answer),), train=True)))


def asked(*question: str | np.ndarray | Image.Image) -> Message:
    parts: list[Part] = []
    for each in question:
        kind = "image" if isinstance(each, Image.Image) else "audio"
        parts.append(Text(each) if isinstance(each, str) else Media(kind, each))
    return Message("user", tuple(parts))


def published_tokens(samples: int, step: int) -> int:
    """Placeholders by the published processing code, which counts a clip as a whole."""
    return ((math.ceil(samples / 160) - 1) // 2 + 1 - step) // step + 1


@pytest.mark.parametrize("family", OMNI)
def test_as_many_placeholders_as_published(family: str) -> None:
    spec = HEARING[family]
    for samples in (*range(spec.shortest, 40_000, 37), *range(470_000, 1_040_001, 4_001)):
        found = plan_audio(samples, spec)
        assert found.tokens == published_tokens(samples, spec.pool_step)
        assert all(run == 25 for run in found.runs[:-1]) if family == "o2_6" else len(found.runs) == 1
    with pytest.raises(ValueError, match="is too short for a token"):
        plan_audio(spec.shortest - 1, spec)


@pytest.mark.parametrize("family", OMNI)
def test_as_many_placeholders_as_the_network_makes_tokens(ready, family: str) -> None:
    model, encoder = ready(family)
    for seconds in (0.1, 0.11, 0.333, 1.0, 7.77, 30.01, 65.0):
        example = encoder.encode(talk(tone(seconds), "What?"))
        batch = pad([example], encoder.pad_id)
        with torch.no_grad():
            made = len(model.get_audio_embeds(batch["audio_features"], batch["audio_lengths"]))
        assert int((example.audio_bound[:, 1] - example.audio_bound[:, 0]).sum()) == made


def test_frames_are_those_of_the_published_extractor() -> None:
    """Filled up with silence, normalised by the loudest frame of the whole 30 s, cut back."""
    from transformers import WhisperFeatureExtractor

    spec, samples = HEARING["o2_6"], tone(31.25)
    found = log_mel(samples, spec)
    assert [clip.shape for clip in found] == [(80, 3000), (80, 125)]
    for clip, piece in zip(found, (samples[:480_000], samples[480_000:]), strict=True):
        given = WhisperFeatureExtractor()(piece, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
        assert torch.equal(clip, given["input_features"][0][:, : given["attention_mask"].sum()])


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)


def loud_end(samples: int) -> np.ndarray:
    """Quiet but for the last samples, whose frames the clip does not have alone."""
    return np.where(np.arange(samples) < samples - 30, 1e-4, 0.9).astype(np.float32)


def silence(samples: int) -> np.ndarray:
    return np.zeros(samples, np.float32)


ODD = [801, 960, 1_281, 2_399, 2_400, 4_001, 15_999, 16_000, 16_160, 160_037]
NEARLY_FULL = [479_199, 479_200, 479_201, 479_440, 479_599, 479_680, 479_841, 479_999, 480_000]


@pytest.mark.parametrize("family", OMNI)
@pytest.mark.parametrize("sound", [noise, loud_end, silence, lambda samples: tone(samples / 16_000)])
def test_short_padding_gives_the_bits_of_the_full_one(family: str, sound: Callable[[int], np.ndarray]) -> None:
    """Clips of every length, the last pieces of longer ones, and those that the padding just fills."""
    from transformers import WhisperFeatureExtractor

    spec, published = HEARING[family], WhisperFeatureExtractor()
    for samples in (*ODD, *NEARLY_FULL, 480_000 + 1_700):
        if samples < spec.shortest:
            continue
        wave = sound(samples)
        pieces = [wave[start : start + 480_000] for start in range(0, samples, 480_000)]
        given = published(pieces, sampling_rate=16_000, return_tensors="pt")["input_features"]
        found = log_mel(wave, spec)
        assert len(found) == len(pieces)
        for clip, full, piece in zip(found, given, pieces, strict=True):
            assert torch.equal(clip, full[:, : spec.frames(len(piece))]), (samples, len(piece))


def test_short_padding_with_other_frames() -> None:
    """Checkpoints may have another hop and window, and pieces that are no multiple of them."""
    from transformers import WhisperFeatureExtractor

    for hop, window, seconds in ((80, 400, 2), (160, 256, 3), (237, 400, 2), (300, 320, 2)):
        spec = AudioSpec(pool_step=2, bins=40, hop=hop, window=window, chunk_seconds=seconds)
        published = WhisperFeatureExtractor(40, hop_length=hop, chunk_length=seconds, n_fft=window)
        for samples in (spec.shortest, 1_999, 9_000, 16_000 * seconds - window, 16_000 * seconds - 1):
            full = published(noise(samples), sampling_rate=16_000, return_tensors="pt")["input_features"][0]
            assert torch.equal(log_mel(noise(samples), spec)[0], full[:, : spec.frames(samples)]), (hop, samples)


def rows() -> list[Sample]:
    """Rows with sound, some of it longer than a piece of 2 s, with pictures, and one of text alone."""
    picture = Image.effect_noise((150, 80), 70).convert("RGB")
    return [
        talk("First ", tone(2.4, pitch=300), " then ", picture, " and ", tone(0.5), "?"),
        talk("Hello?", answer="Hi."),
        talk(tone(4.7, pitch=500), "\nWhat?", answer="Something longer."),
        talk(picture, tone(0.9, pitch=700)),
    ]


@pytest.mark.parametrize("family", OMNI)
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_a_batch_are_what_they_are_alone(ready, family: str, side: Any) -> None:
    model, encoder = ready(family)
    encoder = copy.copy(encoder)
    encoder.audio_spec = replace(HEARING[family], chunk_seconds=2)
    examples = [encoder.encode(sample) for sample in rows()]
    assert [len(example.audio) for example in examples] == [3, 0, 3, 1]
    batch = pad(examples, encoder.pad_id, side=side)
    with torch.no_grad():
        losses = model(**batch).row_loss
        together = model(**{name: each for name, each in batch.items() if name != "labels"}).logits
        for row, example in enumerate(examples):
            alone = pad([example], encoder.pad_id, side=side)
            size = len(example.input_ids)
            place = slice(0, size) if side == "right" else slice(together.shape[1] - size, None)
            logits = model(**{name: each for name, each in alone.items() if name != "labels"}).logits[0]
            assert torch.allclose(together[row, place], logits, atol=3e-4), row
            assert torch.allclose(losses[row], model(**alone).row_loss[0], atol=1e-3), row


@pytest.mark.parametrize("family", OMNI)
def test_training_reads_what_inference_reads(ready, family: str) -> None:
    _, encoder = ready(family)
    for sample in rows():
        trained, asked_for = encoder.encode(sample), encoder.encode(sample, generate=True)
        prompt = asked_for.input_ids.tolist()
        ids, labels = trained.input_ids.tolist(), trained.labels.tolist()
        assert ids[: len(prompt)] == prompt
        assert labels[: len(prompt)] == [-100] * len(prompt)
        end = encoder.prompt_tokenizer.control("<|im_end|>")
        answer = encoder.prompt_tokenizer.continuation(sample.messages[-1].text)
        assert [label for label in labels if label != -100] == [*answer, end]


def test_only_the_last_answer_is_opened_for_speech(ready) -> None:
    """As the published prompt of o-2.6 has the answers of a history: bare."""
    _, encoder = ready("o2_6")
    first, answer = talk(tone(0.5), "What?").messages
    sample = Sample("x", Source("data.json", 0), (first, answer, asked("Sure?"), answer))
    ids = encoder.encode(sample).input_ids.tolist()
    control = encoder.prompt_tokenizer.control
    speech = [control(token) for token in ("<|spk_bos|>", "<|spk|>", "<|spk_eos|>", "<|tts_bos|>")]
    assert [ids.count(token) for token in speech] == [1, 1, 1, 1]
    starts = [place for place, token in enumerate(ids) if token == control("<|im_start|>")]
    assert ids.index(speech[0]) > starts[-1]
    assert "Qwen" not in str(encoder.tokenizer.decode(ids))


@pytest.mark.parametrize("family", OMNI)
def test_measured_without_the_network(ready, family: str) -> None:
    _, encoder = ready(family)
    for sample in rows():
        example, measure = encoder.encode(sample), encoder.measure(sample)
        assert measure.tokens == len(example.input_ids)
        assert measure.patches == len(example.patches)
        assert measure.frames == sum(clip.shape[1] for clip in example.audio)
    heard, silent = encoder.measure(talk(tone(2.0), "What?")), encoder.measure(talk("What?"))
    assert heard.cost > silent.cost + heard.tokens - silent.tokens


@pytest.mark.parametrize("family", [family.name for family in usable() if family.audio_spec is None])
def test_the_others_say_who_hears(family: str, tiny) -> None:
    base = resolve_base(str(tiny(family)))
    encoder = Encoder(base.family, load_tokenizer(base.folder), base.settings)
    with pytest.raises(DataError, match=r"no audio; use a model that does \(MiniCPM-o 2.6, MiniCPM-o 4.5\)"):
        encoder.measure(talk(tone(0.5), "What?"))


def test_a_voice_in_the_system_turn(ready) -> None:
    """As the published calls of o-4.5 have it; a picture there stays an error."""
    _, encoder = ready("o4_5")
    voice = Message("system", (Text("Speak like "), Media("audio", tone(0.5))))
    question, answer = talk("What?").messages
    sample = Sample("x", Source("data.json", 0), (voice, question, answer))
    assert len(encoder.encode(sample).audio) == 1
    seen = Message("system", (Media("image", Image.new("RGB", (30, 30))),))
    with pytest.raises(DataError, match="media belong into user turns"):
        encoder.encode(Sample("x", Source("data.json", 0), (seen, question, answer)))


def test_too_long_samples_lose_turns_with_their_sound(ready) -> None:
    _, encoder = ready("o4_5")
    voice = Message("system", (Media("audio", tone(0.3)),))
    first, answer = talk(tone(5.0), "What?").messages
    second = talk(tone(1.0, pitch=600), "And?").messages[0]
    sample = Sample("x", Source("data.json", 0), (voice, first, answer, second, answer))
    full = encoder.measure(sample).tokens
    limited = copy.copy(encoder)
    limited.max_length = full - 10
    example, outcome = LengthPolicy(limited, "shrink").encode(sample)
    assert outcome == "turns removed"
    assert [clip.shape[1] for clip in example.audio] == [30, 100]
    with pytest.raises(DataError, match="63 for audio"):
        LengthPolicy(limited, "error").encode(sample)


def test_records_of_sharegpt(ready, tmp_path: Path) -> None:
    _, encoder = ready("o2_6")
    write_wav(tmp_path / "a.wav", 0.5)
    turns = [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "A tone."}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns, "audios": ["a.wav"]}]))
    example = encoder.encode(read(tmp_path / "data.json")[0])
    same = encoder.encode(talk((np.round(tone(0.5) * 32768) / 32768).astype(np.float32), "What?"))
    assert example.input_ids.tolist() == same.input_ids.tolist()
    assert torch.equal(example.audio[0], same.audio[0])


def test_settings_of_the_checkpoint() -> None:
    config = {"audio_pool_step": 3, "audio_processor": {"feature_size": 128, "hop_length": 80}}
    spec = by_name("o2_6").audio_spec
    assert spec is not None
    assert spec(config) == AudioSpec(pool_step=3, run_seconds=1.0, bins=128, hop=80)
    assert spec({}) == AudioSpec(pool_step=2, run_seconds=1.0)
    assert spec({"chunk_input": False, "audio_chunk_length": 2.0}) == spec({})
    whole = by_name("o4_5").audio_spec
    assert whole is not None
    assert whole({}) == whole({"stream_input": True}) == AudioSpec(pool_step=5)
