"""Training records with which ranks have different numbers and kinds of media at a step."""

from __future__ import annotations

import json
import random
import wave
from pathlib import Path
from typing import Any

from clips import write_clip
from PIL import Image

# Widths and heights; the tiny checkpoints cut what is larger than 112 x 112 pixels into slices, the small one is
# enlarged to another number of patches.
SIZES = ((112, 112), (224, 224), (98, 126), (336, 112), (56, 140), (150, 260))
PER_RANK = 2
STEPS = 20
# Which rank has images, step by step. The first twelve: exactly one; then both with other images, or neither.
TURNS = ("first", "second") * 6 + ("both", "none") * 4
WORDS = ("red", "green", "blue", "yellow", "black", "white", "left", "right", "square", "circle")
EVALUATED = 11


def write_records(folder: Path) -> Path:
    """Writes train.json, eval.json and text.json (no image) below ``folder``."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    train = []
    for turn in TURNS:
        for rank in ("first", "second"):
            for _ in range(PER_RANK):
                pictures = draw.choice((1, 1, 2)) if turn in (rank, "both") else 0
                train.append(_record(folder, f"t{len(train)}", pictures, draw))
    assert len(train) == 2 * PER_RANK * STEPS
    evaluated = [_record(folder, f"e{index}", index % 3, draw) for index in range(EVALUATED)]
    text = [_record(folder, f"x{index}", 0, draw) for index in range(16)]
    for name, records in (("train", train), ("eval", evaluated), ("text", text)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def write_media_records(folder: Path, *, sound: bool, timelines: bool = False) -> Path:
    """train.json and eval.json in which two ranks nearly never have the same media at a step.

    With ``timelines`` some records are full-duplex ones.
    """
    draw = random.Random(1)
    folder.mkdir(parents=True)
    media = ("text", "image", "video", *(("audio",) if sound else ()), *(("duplex",) if timelines else ()))
    orders = [(first, second) for first in media for second in media if first != second]
    train = []
    for step in range(STEPS):
        for kind in orders[step % len(orders)]:
            for _ in range(PER_RANK):
                train.append(_media_record(folder, f"m{len(train)}", kind, draw))
    evaluated = [_media_record(folder, f"v{index}", media[index % len(media)], draw) for index in range(EVALUATED)]
    for name, records in (("train", train), ("eval", evaluated)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def _media_record(folder: Path, name: str, kind: str, draw: random.Random) -> dict[str, Any]:
    if kind in ("text", "image"):
        return _record(folder, name, int(kind == "image"), draw)
    if kind == "duplex":
        return _timeline(folder, name, draw)
    record = _record(folder, name, 0, draw)
    if kind == "video":
        path = write_clip(folder / f"{name}.mp4", draw.randint(2, 8), fps=2)
    else:
        path = write_sound(folder / f"{name}.wav", draw.randint(2_000, 30_000), draw)
    record["conversations"][0]["content"] = f"<{kind}>\n" + record["conversations"][0]["content"]
    return {**record, kind: path.name}


def _timeline(folder: Path, name: str, draw: random.Random) -> dict[str, Any]:
    """User audio of up to two seconds, sometimes a picture, and a turn of the model."""
    path = write_sound(folder / f"{name}.wav", draw.randint(2_000, 30_000), draw)
    turn = {"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 4))), "start": draw.choice((0.5, 1.5))}
    timeline: dict[str, Any] = {"user": [{"audio": path.name, "start": 0}], "assistant": [turn]}
    if draw.random() < 0.5:
        picture = folder / f"{name}.png"
        Image.frombytes("RGB", (112, 112), draw.randbytes(3 * 112 * 112)).save(picture)
        timeline["images"] = [{"image": picture.name, "start": 1}]
    return {"id": name, "duplex": timeline}


def write_sound(path: Path, samples: int, draw: random.Random) -> Path:
    """Noise at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(draw.randbytes(2 * samples))
    return path


def _record(folder: Path, name: str, pictures: int, draw: random.Random) -> dict[str, Any]:
    record: dict[str, Any] = {"id": name}
    marks = [f"<image_{index:02d}>" for index in range(pictures)]
    for index, mark in enumerate(marks):
        width, height = draw.choice(SIZES)
        path = folder / f"{name}_{index}.png"
        Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height)).save(path)
        record.setdefault("image", {})[mark] = path.name
    # Answers of one to eight words: micro-batches differ in the number of labelled tokens.
    question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(1, 8))) for _ in range(2))
    question = "\n".join([*marks, question])
    record["conversations"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return record


def write_pairs(folder: Path, *, sound: bool = False) -> Path:
    """train.json and eval.json of preference pairs: the media records with a second, rejected answer."""
    write_media_records(folder, sound=sound)
    draw = random.Random(2)
    for name in ("train", "eval"):
        path = folder / f"{name}.json"
        records = json.loads(path.read_text())
        for record in records:
            record["rejected_response"] = " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
        path.write_text(json.dumps(records))
    return folder
