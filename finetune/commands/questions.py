"""Reads the evaluation prompts of a data file, with their reference answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune.sample import DataError, Sample
from finetune.utils.errors import UnusableResultError, located

if TYPE_CHECKING:
    from finetune.encoding.encoder import Encoder
    from finetune.readers.mixture import Mixture

# Position in the data file -> the conversation up to the question, and the accepted answers.
Questions = dict[int, tuple[Sample, list[str]]]


def read_questions(
    samples: Mixture,
    limit: int | None,
    encoder: Callable[[], Encoder],
    *,
    skip_bad: bool = False,
    max_bad_share: float = 1.0,
    answered: bool = True,
) -> tuple[Questions, list[str]]:
    """Prompts and accepted answers: the last answer, or "answers" of a record in the official format.

    Args:
        samples: the data.
        limit: only the first N records; None for all.
        encoder: gives the encoder, which writes tools and their calls by the chat template; called when it is needed.
        skip_bad: skip records that cannot be used, and those of which the encoder makes no prompt.
        max_bad_share: the largest share of records that may be skipped.
        answered: False if records need no answer: the prompt ends with the last turn that is not the assistant's.

    Returns:
        The questions, and what is wrong with each record that was skipped.

    Raises:
        DataError: a record that cannot be used, or none that can.
        UnusableResultError: more of them are left out than that share allows.
    """
    from finetune.media import video

    questions: Questions = {}
    skipped = []
    for index in range(len(samples) if limit is None else min(limit, len(samples))):
        try:
            question = _question(samples, index, encoder, answered=answered)
            if skip_bad:
                encoder().encode(question[0], generate=True)
                with located(question[0].source):
                    for media in question[0].media("video"):
                        video.check(media)
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
        else:
            questions[index] = question
    _check_share(samples.title, len(questions), skipped, max_bad_share)
    return questions, skipped


def _check_share(title: str, usable: int, skipped: Sequence[str], max_bad_share: float) -> None:
    """Refuses data of which too little can be used.

    Raises:
        DataError: nothing.
        UnusableResultError: more is left out than ``max_bad_share`` allows.
    """
    from finetune.encoding.sample_policy import share_is_bad

    if not usable:
        raise DataError(
            f"{title}: no record can be used; the first: {skipped[0]}" if skipped else f"{title}: no record"
        )
    if share_is_bad(len(skipped), usable + len(skipped), max_bad_share):
        raise UnusableResultError(
            f"{title}: {len(skipped)} of {usable + len(skipped)} records cannot be used, more than "
            f"--max_bad_share {max_bad_share:g} allows; fix the data, or raise the limit. The first: {skipped[0]}"
        )


def _question(
    samples: Mixture, index: int, encoder: Callable[[], Encoder], *, answered: bool
) -> tuple[Sample, list[str]]:
    from finetune.evaluation.batched_generation import split_answer
    from finetune.readers.record_reader import check_text

    sample = samples[index]
    if sample.tools or any(message.calls for message in sample.messages):
        sample = encoder().tools.expand(sample)
    if not answered and sample.messages[-1].role != "assistant":
        return sample, []
    prompt, answer = split_answer(sample)
    if not answered:
        return prompt, []
    answers = samples.record(index).get("answers") if samples.format_of(index) == "official" else None
    if answers is None:
        return prompt, [answer]
    if not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
        raise DataError(f"{prompt.source}: 'answers' must be a list of strings, the accepted answers")
    with located(prompt.source):
        for answer in answers:
            check_text(answer, "'answers'")
    return prompt, answers
