"""Warnings about usable samples: empty answers, boxes outside of the image, control tokens in text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from finetune.sample import Message, Sample, Text
from finetune.templates.tokenizer_view import TokenizerView

_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_MOST, _UNIT = 1000, "coordinates are integers from 0 to 1000, relative to the image's width and height"
# The readers report these tokens.
_MEDIA = re.compile(r"image|slice|video|audio|unit|point")
_SHOWN, _MANY = 60, 3


def suspicions(sample: Sample, prompt_tokenizer: TokenizerView) -> Iterator[str]:
    """Notes about suspicious content of a sample, without parts that differ between records."""
    if any(message.train and not _said(message) for message in sample.messages):
        yield "a trained answer is empty after </think>"
    texts = [part.text for message in sample.messages for part in message.parts if isinstance(part, Text)]
    boxes = [_NUMBER.findall(box) for text in texts for box in _BOX.findall(text)]
    if any(len(numbers) != 4 for numbers in boxes):
        yield "a <box> is not four numbers, x1 y1 x2 y2"
    if any(not 0 <= float(number) <= _MOST for numbers in boxes for number in numbers):
        yield f"a <box> has a number outside of 0 to {_MOST}; {_UNIT}"
    if any("." in number for numbers in boxes for number in numbers):
        yield f"a <box> has a number that is not an integer; {_UNIT}"
    tokens = dict.fromkeys(
        token for text in texts for token in prompt_tokenizer.spelled(text) if not _MEDIA.search(token)
    )
    for token in list(tokens)[:_MANY]:
        yield f"the text contains {token!r}, a control token of the prompt; it is encoded as plain text"


def _said(message: Message) -> str:
    """The text of an answer after its thinking."""
    return message.text.rpartition("</think>")[2].strip()


def last_answer(sample: Sample) -> str:
    """The last trained answer, empty if there is none; a long one as its beginning and a digest."""
    text = next((message.text.strip() for message in reversed(sample.messages) if message.train), "")
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}... {hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=4).hexdigest()}"
