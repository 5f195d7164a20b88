"""Input of the preprocessing benchmarks: 16 images of four size classes, conversations, and a tokenizer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CLASSES = {"640x480 jpg": 11, "1344x1344 jpg": 2, "1920x1080 png": 2, "3000x4000 jpg": 1}
"""Class of picture to how many of it are in the mix."""
QUERIES, SLICES, RESOLUTION, PATCH = 96, 9, 448, 14
CONFIG = {
    "model_type": "minicpmv",
    "query_num": QUERIES,
    "patch_size": PATCH,
    "slice_config": {"max_slice_nums": SLICES, "scale_resolution": RESOLUTION, "patch_size": PATCH},
}
"""Of config.json of MiniCPM-Llama3-V 2.5, what sample preparation reads."""

_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<unk>"),
    *("<image>", "</image>", "<slice>", "</slice>", "<ref>", "</ref>", "<box>", "</box>"),
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VOCABULARY = 16_000
_ANSWER_WORDS, _QUESTION_WORDS = 270, 50


def write(folder: Path, classes: Iterable[str] = CLASSES) -> dict[str, list[int]]:
    """Writes the pictures of some classes and data.json into a folder; the numbers of the records of every class."""
    chance, words = random.Random(0), _words()
    records: list[dict[str, Any]] = []
    numbers: dict[str, list[int]] = {}
    for name in classes:
        count, (size, suffix) = CLASSES[name], name.split()
        width, height = map(int, size.split("x"))
        numbers[name] = list(range(len(records), len(records) + count))
        for number in numbers[name]:
            file = folder / f"{number}.{suffix}"
            picture = _screenshot(width, height, number, words) if suffix == "png" else photo(width, height, number)
            picture.save(file, quality=90)  # which means nothing to PNG
            question, answer = text(chance, words, _QUESTION_WORDS), text(chance, words, _ANSWER_WORDS)
            turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
            records.append({"id": str(number), "image": str(file), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return numbers


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 16 000 tokens with the split of Llama-3, trained on made-up text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    chance, words = random.Random(1), _words()
    lines = [text(chance, words, 200) for _ in range(2000)] + ["assistant\n\n", "user\n\n", "system\n\n"] * 50
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=_VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIALS])
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", unk_token="<unk>"
    )


def text(chance: random.Random, words: list[str], count: int) -> str:
    """Sentences of so many made-up words; a few words are frequent and most are rare, as in a language."""
    drawn = chance.choices(words, cum_weights=_frequencies(len(words)), k=count)
    sentences = []
    while drawn:
        length = chance.randint(5, 15)
        sentence, drawn = drawn[:length], drawn[length:]
        sentences.append(
            " ".join(sentence).capitalize() + chance.choice((".", ".", ",", "?", f" {chance.randint(1, 999)}."))
        )
    return " ".join(sentences)


@cache
def _frequencies(count: int) -> list[float]:
    return list(accumulate(1 / (rank + 10) for rank in range(count)))


@cache
def _words() -> list[str]:
    chance = random.Random(2)
    syllables = ["".join(pair) for pair in zip("bcdfghklmnprstvwz" * 5, "aeiou" * 17, strict=True)]
    return ["".join(chance.choices(syllables, k=chance.choice((1, 2, 2, 3, 3, 4)))) for _ in range(20_000)]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Noise whose strength falls with its frequency, as in photographs, with a few shapes."""
    chance = np.random.default_rng(seed)
    longer, side, layers = max(width, height), 2, np.zeros((height, width, 3), np.float32)
    while side <= longer:
        small = chance.normal(0, 1, (3, max(height * side // longer, 2), max(width * side // longer, 2)))
        for channel, values in enumerate(small.astype(np.float32)):
            layers[..., channel] += np.asarray(Image.fromarray(values).resize((width, height))) / math.sqrt(side)
        side *= 2
    scaled = 128 + 50 * layers / layers.std() + chance.normal(0, 2, layers.shape)
    picture = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for left, top, share in chance.random((12, 3)):
        x, y, side = int(left * width), int(top * height), int(20 + share * width / 6)
        draw.ellipse((x, y, x + side, y + side), fill=tuple(map(int, chance.integers(0, 256, 3))))
        draw.text((x, y), "a sign with words on it", fill="white", font_size=max(width // 40, 10))
    return picture


def _screenshot(width: int, height: int, seed: int, words: list[str]) -> Image.Image:
    """Windows with lines of text, and a photo in one of them."""
    chance = random.Random(seed)
    picture = Image.new("RGB", (width, height), (236, 238, 241))
    draw = ImageDraw.Draw(picture)
    for column in range(3):
        left = column * width // 3
        draw.rectangle((left + 10, 20, left + width // 3 - 10, height - 20), fill="white", outline=(180, 180, 190))
        for line in range(40, height - 60, 22):
            draw.text((left + 24, line), text(chance, words, 9)[:70], fill=(30, 30, 40), font_size=14)
    picture.paste(photo(width // 3, height // 3, seed), (width // 2, height // 2))
    return picture
