"""Records that split unevenly: at a given step one rank has images and the other has none, or both have others."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

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
