"""Sound files become waveforms; files that are none, or not whole, are refused by name."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sounds import CODECS, tone, write_coded, write_wav

from finetune.media import audio
from finetune.sample import DataError, Media
from finetune.utils.errors import UserError


def load(data: Path | bytes | np.ndarray) -> np.ndarray:
    return audio.load(Media("audio", data))


def refusal(data: Path | bytes | np.ndarray) -> str:
    with pytest.raises(DataError) as caught:
        load(data)
    assert str(caught.value).startswith("audio ")
    return str(caught.value)


def test_a_file_at_16_khz_keeps_its_samples(tmp_path: Path) -> None:
    found = load(write_wav(tmp_path / "a.wav", 0.5))
    assert found.dtype == np.float32
    assert np.abs(found - tone(0.5)).max() < 1 / 32768


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (8_000, 1), (48_000, 6)])
def test_other_rates_are_resampled_and_channels_averaged(tmp_path: Path, rate: int, channels: int) -> None:
    found = load(write_wav(tmp_path / "a.wav", 1.0, rate=rate, channels=channels))
    assert len(found) == 16_000
    middle = slice(1000, 15_000)  # the filter needs samples on both sides
    assert np.abs(found - tone(1.0))[middle].max() < 1e-3


@pytest.mark.parametrize(("rate", "read"), [(999, False), (1_000, True), (767_999, True), (768_001, False)])
def test_a_rate_that_only_a_damaged_header_has(tmp_path: Path, rate: int, read: bool) -> None:
    file = write_wav(tmp_path / "a.wav", 0.2, rate=rate)
    if read:
        assert len(load(file)) == pytest.approx(3200, abs=20)
    else:
        assert f"sampling rate of {rate} Hz" in refusal(file)


@pytest.mark.parametrize("suffix", CODECS)
def test_coded_files(tmp_path: Path, suffix: str) -> None:
    found = load(write_coded(tmp_path / f"a{suffix}", 1.5))
    assert len(found) == pytest.approx(24_000, abs=1100)  # AAC fills its last frame
    spectrum = np.abs(np.fft.rfft(found[4000:20_000]))
    assert spectrum.argmax() == 440
    assert np.abs(found[4000:20_000]).max() == pytest.approx(0.4, abs=0.05)


def test_the_sound_track_of_a_video(tmp_path: Path) -> None:
    from clips import write_clip

    assert len(load(write_clip(tmp_path / "a.mp4", sound=True))) == pytest.approx(16_000, abs=1500)
    assert "has no audio track" in refusal(write_clip(tmp_path / "b.mp4"))


def test_bytes_and_samples(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", 0.5)
    assert np.array_equal(load(path.read_bytes()), load(path))
    assert np.array_equal(load(tone(0.5).astype(np.float64)), tone(0.5))
    for wrong in (np.zeros((2, 900), np.float32), np.zeros(900, np.int16)):
        assert "a mono float waveform at 16 kHz" in refusal(wrong)
    assert "not finite" in refusal(np.array([0.0, np.nan]))
    assert "0 samples" in refusal(np.zeros(0))


@pytest.mark.parametrize("suffix", [".wav", *CODECS])
def test_a_truncated_file(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"a{suffix}"
    write_wav(whole, 1.5) if suffix == ".wav" else write_coded(whole, 1.5)
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert "truncated" in refusal(cut)


def test_a_wav_file_from_a_pipe_is_whole(tmp_path: Path) -> None:
    """Its writer could not go back to fill in the length."""
    data = write_wav(tmp_path / "a.wav", 0.5).read_bytes()
    at = data.index(b"data") + 4
    piped = data[:4] + b"\xff" * 4 + data[8:at] + b"\xff" * 4 + data[at + 4 :]
    assert len(load(piped)) == 8000


def test_files_that_are_no_sound(tmp_path: Path) -> None:
    write_wav(tmp_path / "none.wav", 0)
    assert "0 samples" in refusal(tmp_path / "none.wav")
    (tmp_path / "empty.wav").touch()
    assert "0 bytes" in refusal(tmp_path / "empty.wav")
    (tmp_path / "text.mp3").write_text("no sound " * 99)
    assert "cannot be decoded as audio" in refusal(tmp_path / "text.mp3")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert "cannot be decoded as audio" in refusal(tmp_path / "a.png")
    assert "is a folder" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "gone.wav")


def test_a_list_of_other_files_is_no_sound(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", 0.5)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.wav\n")
    assert "cannot be decoded as audio" in refusal(tmp_path / "list.m3u8")


def test_sound_of_any_length_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wav(tmp_path / "a.wav", 3.0)
    assert len(load(path)) == 48_000
    monkeypatch.setattr(audio, "MAX_SECONDS", 2)
    assert "longer than 2 seconds" in refusal(path.read_bytes())
    assert "longer than 2 seconds" in refusal(tone(3.0))


def test_without_the_decoder_its_installation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r'pip install "av>=14,<19"') as caught:
        load(b"RIFF")
    assert not isinstance(caught.value, DataError)  # no record is to blame, none may be skipped for it
