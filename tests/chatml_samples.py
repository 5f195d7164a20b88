"""Conversations and their rendering for the tests of the ChatML prompts."""

from functools import cache
from typing import Any

from golden_tokenizers import written

from finetune.encoding.encoder import Encoder
from finetune.families import by_name
from finetune.media.slicing import SlicePlan
from finetune.sample import Media, Message, Part, Sample, Source, Text
from finetune.templates.prompt_types import IGNORE, TokenizedPrompt

CHATML = ("v2_6", "o2_6", "v4_0", "v4_5", "o4_5")
THINKING = ("v4_5", "o4_5")
IMAGE = Media("image", Text)  # pyright: ignore[reportArgumentType]  # never opened here
WHOLE, CUT = SlicePlan((448, 448)), SlicePlan((448, 448), (2, 2), (896, 896), (448, 448))


def turn(role: str, *parts: str | Part, train: bool | None = None) -> Message:
    """A turn; answers are trained unless told otherwise."""
    texts = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    return Message(role, texts, train=role == "assistant" if train is None else train)


def talk(*turns: str | Message) -> Sample:
    """A conversation of texts, by turns of user and assistant."""
    made = [
        each if isinstance(each, Message) else turn(("user", "assistant")[n % 2], each) for n, each in enumerate(turns)
    ]
    return Sample(id="x", source=Source("data.json", 3), messages=tuple(made))


@cache
def encoder(family: str, **options: Any) -> Encoder:
    return Encoder(by_name(family), written(family), {"query_num": 4, "slice_config": {"max_slice_nums": 9}}, **options)


def render(family: str, sample: Sample, *plans: SlicePlan, generate: bool = False, **options: Any) -> TokenizedPrompt:
    return encoder(family, **options).render(sample, plans, generate)


def text(family: str, rendered: TokenizedPrompt) -> str:
    """The prompt, a run of placeholders as one question mark."""
    return str(written(family).decode(rendered.input_ids, skip_special_tokens=False)).replace("<unk>" * 4, "?")


def trained(family: str, rendered: TokenizedPrompt) -> list[str]:
    """The text of every run of labels; every label is the id at its place."""
    runs: list[list[int]] = [[]]
    for label, number in zip(rendered.labels, rendered.input_ids, strict=True):
        assert label in (IGNORE, number)
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [str(written(family).decode(run, skip_special_tokens=False)) for run in runs if run]
