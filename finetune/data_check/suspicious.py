"""What can be trained and is seldom meant: empty answers, boxes outside of the image, control tokens in text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from finetune.sample import Message, Sample, Text
from finetune.templates.tokenizer_view import TokenizerView

_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_MOST, _UNIT = 1000, "coordinates are whole thousandths of the image's width and height"
# The readers know these names and tell of them themselves.
_MEDIA = re.compile(r"image|slice|video|audio|unit|point")
_SHOWN, _MANY = 60, 3


def suspicions(sample: Sample, vocabulary: TokenizerView) -> Iterator[str]:
    """What is odd about a sample, as its notes say it: without anything that differs from record to record."""
    if any(message.train and not _said(message) for message in sample.messages):
        yield "an answer that is trained is empty behind its thinking"
    texts = [part.text for message in sample.messages for part in message.parts if isinstance(part, Text)]
    boxes = [_NUMBER.findall(box) for text in texts for box in _BOX.findall(text)]
    if any(len(numbers) != 4 for numbers in boxes):
        yield "a <box> is not four numbers, x1 y1 x2 y2"
    if any(not 0 <= float(number) <= _MOST for numbers in boxes for number in numbers):
        yield f"a <box> has a number outside of 0 to {_MOST}; {_UNIT}"
    if any("." in number for numbers in boxes for number in numbers):
        yield f"a <box> has a number that is not whole; {_UNIT}"
    tokens = dict.fromkeys(token for text in texts for token in vocabulary.spelled(text) if not _MEDIA.search(token))
    for token in list(tokens)[:_MANY]:
        yield f"the text holds {token!r}, which is a control token of the prompt; it is trained as plain letters"


def _said(message: Message) -> str:
    """What an answer says behind its thinking."""
    return message.text.rpartition("</think>")[2].strip()


def last_answer(sample: Sample) -> str:
    """The last answer that is trained, empty where there is none; of a long one its beginning and a digest."""
    text = next((message.text.strip() for message in reversed(sample.messages) if message.train), "")
    if len(text) <= _SHOWN:
        return text
    return f"{text[:_SHOWN]}... {hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=4).hexdigest()}"
