"""``model.chat`` and the terminal chat with videos."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from clips import picture, write_clip

from finetune.__main__ import main
from finetune.chat.messages import read_messages
from finetune.chat.pipeline import ChatPipeline, read_options
from finetune.media.video_sampling import VideoOptions
from finetune.models import load_model, load_tokenizer
from finetune.readers import read
from finetune.sample import DataError
from finetune.utils.errors import ArgumentError

GREEDY: dict[str, Any] = {"sampling": False, "max_new_tokens": 5}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", 16, fps=4, size=(112, 112))


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


@pytest.mark.parametrize("family", ["v2_6", "v4_5", "v4_7"])
def test_a_batch_with_videos_is_its_single_runs(tiny, clip: Path, family: str) -> None:
    """Groups of packed frames too: of 4 seconds at most 2 groups are wanted."""
    model: Any = load_model(tiny(family)).eval()
    tokenizer = load_tokenizer(tiny(family))
    options = GREEDY | ({"video": VideoOptions(max_frames=2)} if family == "v4_5" else {})
    asked = (
        [user(clip, "What?")],
        [user("Hello")],
        [user(picture(3, (60, 50)), {"type": "video", "video": str(clip)}, "?")],
    )
    together = model.chat(msgs=list(asked), tokenizer=tokenizer, **options)
    assert together == [model.chat(msgs=each, tokenizer=tokenizer, **options) for each in asked]
    assert "".join(model.chat(msgs=asked[0], tokenizer=tokenizer, stream=True, **options)) == together[0]
    assert model.chat(msgs=asked[0], tokenizer=tokenizer, **options, num_beams=2) is not None


def test_every_way_to_give_a_video(tiny, clip: Path, tmp_path: Path) -> None:
    pipeline = ChatPipeline(load_model(tiny("v2_6")), load_tokenizer(tiny("v2_6")))
    encoder = pipeline.encoder(read_options({})[0])
    (tmp_path / "shots").mkdir()
    for index in range(4):
        picture(index, (112, 112)).save(tmp_path / "shots" / f"{index}.png")
    shots = sorted((tmp_path / "shots").iterdir())
    text = json.dumps([user({"type": "video", "video": [str(shot) for shot in shots]}, "What?")])
    for ways in (
        [[user(clip, "What?")], [user({"type": "video", "video": str(clip)}, "What?")]],
        [text, [user(tmp_path / "shots", "What?")], [user({"type": "video", "video": shots}, "What?")]],
    ):
        examples = [encoder.encode(read_messages(way), generate=True) for way in ways]
        assert all((example.patches == examples[0].patches).all() for example in examples)
        assert len(examples[0].tgt_sizes) == 4
    for wrong, message in (
        ({"type": "video", "video": "gone.mp4"}, "video 'gone.mp4' does not exist"),
        ({"type": "video", "video": 7}, "video of type int"),
        (tmp_path / "gone.mkv", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            read_messages([user(wrong, "What?")])
    with pytest.raises(ArgumentError, match="temporal_ids: give the video itself"):
        read_options({"temporal_ids": [[0, 1]]})


def test_terminal(tiny, clip: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    saved = tmp_path / "saved.json"
    lines = [f"/video {clip}", "What?", f"/video {tmp_path / 'gone.mp4'}", f"/save {saved}"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    flags = ["--model", str(tiny("v2_6")), "--greedy", "--max_new_tokens", "5", "--device", "cpu", "--video_fps", "2"]
    assert main(["chat", *flags]) == 2
    out, err = capsys.readouterr()
    model: Any = load_model(tiny("v2_6")).eval()
    tokenizer = load_tokenizer(tiny("v2_6"))
    options = GREEDY | {"video": VideoOptions(fps=2.0)}
    assert out.strip() == model.chat(msgs=[user(clip, "What?")], tokenizer=tokenizer, **options).strip()
    assert "gone.mp4: no such file" in err
    (sample,) = read(saved)
    assert [(media.kind, media.data) for media in sample.media()] == [("video", clip.resolve())]
