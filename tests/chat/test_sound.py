"""``model.chat`` with sound, as the published calls of MiniCPM-o give it."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sounds import tone, write_wav

from finetune.__main__ import main
from finetune.chat.messages import read_messages
from finetune.chat.pipeline import ChatPipeline, read_options
from finetune.models import load_model, load_tokenizer
from finetune.readers import read
from finetune.sample import DataError, Media, Text
from finetune.utils.errors import ArgumentError

GREEDY: dict[str, Any] = {"sampling": False, "max_new_tokens": 6}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ready(tiny) -> Callable[[str], tuple[Any, Any]]:
    """Network and tokenizer by family, loaded once."""
    loaded: dict[str, tuple[Any, Any]] = {}

    def make(family: str) -> tuple[Any, Any]:
        if family not in loaded:
            loaded[family] = load_model(tiny(family)).eval(), load_tokenizer(tiny(family))
        return loaded[family]

    return make


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


@pytest.mark.parametrize("family", ["o2_6", "o4_5"])
def test_a_batch_with_sound_is_its_single_runs(ready, family: str) -> None:
    model, tokenizer = ready(family)
    conversations = [
        [user("What do you hear?", tone(0.9))],
        [user("Hello")],
        [user(tone(2.3, pitch=300), "Or", tone(0.4), "?"), {"role": "assistant", "content": "A"}, user("Sure?")],
    ]
    together = model.chat(msgs=conversations, tokenizer=tokenizer, **GREEDY)
    assert together == [model.chat(msgs=each, tokenizer=tokenizer, **GREEDY) for each in conversations]


def test_every_way_to_give_a_sound(ready, tmp_path: Path) -> None:
    model, tokenizer = ready("o2_6")
    path = write_wav(tmp_path / "a.wav", 0.7)
    heard = (np.round(tone(0.7) * 32768) / 32768).astype(np.float32)
    ways = [
        heard,
        path,
        {"type": "audio", "audio": heard},
        {"type": "audio", "audio": str(path)},
        {"type": "audio", "audio": base64.b64encode(path.read_bytes()).decode()},
    ]
    pipeline = ChatPipeline(model, tokenizer)
    encoder = pipeline.encoder(read_options({})[0])
    examples = [encoder.encode(read_messages([user(way, "What?")]), generate=True) for way in ways]
    for example in examples:
        assert example.input_ids.tolist() == examples[0].input_ids.tolist()
        assert all((a == b).all() for a, b in zip(example.audio, examples[0].audio, strict=True))
    text = json.dumps([user({"type": "audio", "audio": str(path)}, "What?")])
    assert model.chat(msgs=text, tokenizer=tokenizer, **GREEDY) == model.chat(
        msgs=[user(heard, "What?")], tokenizer=tokenizer, **GREEDY
    )


def test_sound_that_is_none(ready, tmp_path: Path) -> None:
    model, tokenizer = ready("o4_5")
    for wrong, message in (
        ({"type": "audio", "audio": "gone.wav"}, "'gone.wav' does not exist"),
        ({"type": "audio", "audio": "not base64!"}, "neither a file nor base64"),
        ({"type": "audio", "audio": 7}, "audio of type int"),
        (tmp_path / "gone.mp3", "does not exist"),
        (np.zeros((2, 16_000), np.float32), "a mono float waveform"),
        (np.zeros(100, np.float32), "lasts 6 ms, and 80 ms make one token"),
    ):
        with pytest.raises(DataError, match=message):
            model.chat(msgs=[user(wrong, "What?")], tokenizer=tokenizer, **GREEDY)


def test_the_options_of_published_calls(ready) -> None:
    model, tokenizer = ready("o2_6")
    call: dict[str, Any] = {"msgs": [user("What?", tone(0.5))], "tokenizer": tokenizer, "max_new_tokens": 4}
    answer = model.chat(**call, sampling=False)
    assert model.chat(**call, do_sample=False, use_tts_template=True, generate_audio=False) == answer
    with pytest.raises(ArgumentError, match="generate_audio: answers are text"):
        model.chat(**call, generate_audio=True, output_audio_path="a.wav")


def prompt(ready, family: str, *content: Any, **options: Any) -> str:
    """What the network reads, a run of placeholders as its length."""
    model, tokenizer = ready(family)
    joint = options.pop("joint", "\n")
    encoder = ChatPipeline(model, tokenizer).encoder(read_options(options)[0])
    ids = encoder.encode(read_messages([user(*content)], joint=joint), generate=True).input_ids
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    for count in range(60, 0, -1):
        text = text.replace("<unk>" * count, f"[{count}]")
    return text


OPENED = "<|im_start|>user\nWhat?\n"
SPOKEN = "<|spk_bos|><|spk|><|spk_eos|><|tts_bos|>"


def test_prompts_are_the_published_ones(ready) -> None:
    """With sound the answer is opened for speech, in o-2.6 without the default system turn."""
    sound, runs = tone(1.5), "<|audio_start|>[25]<|audio_end|><|audio_start|>[12]<|audio_end|>"
    end = f"<|im_end|>\n<|im_start|>assistant\n{SPOKEN}"
    assert prompt(ready, "o2_6", "What?", sound) == f"{OPENED}{runs}{end}"
    assert prompt(ready, "o2_6", "What?", sound, joint="") == f"<|im_start|>user\nWhat?{runs}{end}"
    whole = prompt(ready, "o2_6", "What?", sound, chunk_input=False)
    assert whole == f"{OPENED}<|audio_start|>[37]<|audio_end|>{end}"
    assert prompt(ready, "o2_6", "What?").startswith("<|im_start|>system\nYou are Qwen")
    assert prompt(ready, "o2_6", "What?", use_tts_template=True) == f"<|im_start|>user\nWhat?{end}"
    thoughtless = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    clip = "<|audio_start|>[15]<|audio_end|>"
    assert prompt(ready, "o4_5", "What?", sound) == f"{OPENED}{clip}{thoughtless}<|tts_bos|>"
    assert prompt(ready, "o4_5", "What?") == f"<|im_start|>user\nWhat?{thoughtless}"
    spoken = prompt(ready, "o4_5", "What?", sound, use_tts_template=True, chunk_input=True)
    runs = "<|audio_start|>[10]<|audio_end|><|audio_start|>[5]<|audio_end|>"
    assert spoken == f"{OPENED}{runs}{thoughtless}<|tts_bos|>"


def test_a_sound_in_the_terminal(ready, tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    """It is heard, and saved as a record that training reads."""
    path = write_wav(tmp_path / "a tone.wav", 0.7)
    lines = [f"/audio {path}", "What?", f"/save {tmp_path / 'saved.json'}", "/audio gone.wav"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    quick = ("--device", "cpu", "--greedy", "--max_new_tokens", "6")
    assert main(["chat", "--model", str(tiny("o2_6")), *quick]) == 2
    out, err = capsys.readouterr()
    model, tokenizer = ready("o2_6")
    assert out == model.chat(msgs=[user(path, "What?")], tokenizer=tokenizer, **GREEDY) + "\n"
    assert "gone.wav: no such file" in err
    assert read(tmp_path / "saved.json")[0].messages[0].parts == (Media("audio", path), Text("\nWhat?"))
