"""Conversations of every kind, as samples and as the chat template of transformers takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.models import load_tokenizer
from finetune.sample import Media, Message, Part, Sample, Source, Text

# Pixels of pictures that stay whole and that are cut, with slices of 112 pixels.
WHOLE, WIDE, TALL, LARGE = (80, 60), (300, 130), (100, 330), (420, 360)


def picture(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts: str | tuple[int, int]) -> Message:
    return Message(
        "user", tuple(Text(part) if isinstance(part, str) else Media("image", picture(part)) for part in parts)
    )


def answer(text: str, *, train: bool = True) -> Message:
    return Message("assistant", (Text(text),), train=train)


CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "text": (user("How many people are waiting?"), answer("Two.")),
    "system": (Message("system", (Text("Answer in one word."),)), user("你好，世界！"), answer("图片。")),
    "whole": (user(WHOLE, "\nWhat is in the picture?"), answer("A cat.")),
    "sliced": (user("Read this: ", WIDE, " twice.  "), answer("  Done.\n")),
    "several": (user(WHOLE, TALL, "Compare them.", LARGE), answer("They differ.")),
    "turns": (
        user(WIDE, "First?"),
        answer("One."),
        user("Second, with another", WHOLE),
        answer("Two.", train=False),
        user(TALL),
        answer("Three."),
    ),
    "last": (user("Look: ", LARGE), answer("Seen.")),
    "thinking": (
        user("Why?"),
        answer("<think>\nFirst thought.\n</think>\n\nBecause."),
        user("Sure?"),
        answer("<think>\nI look again.\n</think>\n\nYes."),
    ),
}


def sample(messages: Sequence[Message]) -> Sample:
    return Sample(id="s", source=Source("data.json", 3), messages=tuple(messages))


def as_published(messages: Sequence[Message]) -> list[Any]:
    def part(given: Part) -> dict[str, object]:
        return (
            {"type": "text", "text": given.text} if isinstance(given, Text) else {"type": "image", "image": given.data}
        )

    return [{"role": message.role, "content": [part(given) for given in message.parts]} for message in messages]


def encoder(folder: Path, **options: Any) -> Encoder:
    base = resolve_base(str(folder))
    return Encoder(base.family, load_tokenizer(folder), base.settings, **options)
