"""Terminal preview of samples: the prompt as the model gets it, with trained tokens marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from finetune.encoding.length_policy import LengthPolicy
from finetune.pages.decoded_prompt import PromptPart, prompt_parts
from finetune.sample import DataError, Sample, as_sample_set
from finetune.templates.duplex import UNIT
from finetune.utils.quoting import plain

_GREEN, _GREY, _CYAN, _PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[36m", "\x1b[0m"


def preview_lines(samples: Sequence[Sample], length_policy: LengthPolicy, most: int, *, colour: bool) -> Iterator[str]:
    """The first samples of a dataset, each with a header line and its text.

    Args:
        samples: the data set; invalid records are shown with their error.
        length_policy: the encoder of the run and its policy for long samples.
        most: maximum number of samples.
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
        yield "".join(_written(list(prompt_parts(length_policy.encoder, fitted)), colour))
        if (rejected := fitted.with_rejected_answer) is not None:
            start = next(place for place, label in enumerate(rejected.rendered.labels) if label >= 0)
            answer = list(prompt_parts(length_policy.encoder, rejected, range(start)))
            yield f"--- rejected, {len(rejected.rendered.input_ids)} tokens with the same prompt:"
            yield "".join(_written(answer, colour))


def _written(found: Sequence[PromptPart], colour: bool) -> Iterator[str]:
    for trained, marked in groupby(found, lambda part: part.trained):
        text = "".join(_painted(part, colour) for part in marked)
        yield f"[[{text}]]" if trained and not colour else text


def _painted(part: PromptPart, colour: bool) -> str:
    text = "\n".join(map(plain, part.text.split("\n")))
    if part.control and part.text == UNIT[0]:
        text = f"\n{text}"  # one line per second
    paint = _GREEN if part.trained else _CYAN if part.medium is not None else _GREY if part.control else ""
    return f"{paint}{text}{_PLAIN}" if paint and colour else text
