"""A sample in the terminal: the prompt as the model gets it, with what is trained marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from finetune.encoding.length_policy import LengthPolicy
from finetune.pages.decoded_prompt import PromptPart, pieces
from finetune.sample import DataError, Sample, as_sample_set
from finetune.utils.quoting import plain

_GREEN, _GREY, _CYAN, _PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[36m", "\x1b[0m"


def show(samples: Sequence[Sample], length_policy: LengthPolicy, most: int, *, colour: bool) -> Iterator[str]:
    """The first samples of a data set, each as a head and its text.

    Args:
        samples: the data set; records that cannot be used are told with their reason.
        length_policy: the encoder of the run and its policy for long samples.
        most: samples to show.
        colour: mark trained tokens by colour; else by double brackets.
    """
    marks = "trained tokens in green" if colour else "trained tokens in [[ ]]"
    for index in range(min(most, len(samples))):
        try:
            fitted = length_policy.fit(samples[index])
        except DataError as error:
            yield f"--- {error}"
            continue
        trained = sum(label >= 0 for label in fitted.rendered.labels)
        counts = f"{len(fitted.rendered.input_ids)} tokens, {trained} of them trained"
        yield f"--- {as_sample_set(samples).source(index)}: {counts}, {fitted.outcome}; {marks}"
        yield "".join(_written(list(pieces(length_policy.encoder, fitted)), colour))


def _written(found: Sequence[PromptPart], colour: bool) -> Iterator[str]:
    for trained, marked in groupby(found, lambda piece: piece.trained):
        text = "".join(_painted(piece, colour) for piece in marked)
        yield f"[[{text}]]" if trained and not colour else text


def _painted(piece: PromptPart, colour: bool) -> str:
    text = "\n".join(map(plain, piece.text.split("\n")))
    paint = _GREEN if piece.trained else _CYAN if piece.medium is not None else _GREY if piece.control else ""
    return f"{paint}{text}{_PLAIN}" if paint and colour else text
