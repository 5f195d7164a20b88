"""Prompts of a data file with their reference answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.sample import DataError, Sample
from finetune.utils.errors import WorthlessError

if TYPE_CHECKING:
    from finetune.encoding.encoder import Encoder
    from finetune.readers.mixture import Mixture

# Position in the data file -> the conversation up to the question, and the accepted answers.
Questions = dict[int, tuple[Sample, list[str]]]


def read_questions(
    samples: Mixture, limit: int | None, judge: Encoder | None = None, max_bad_share: float = 1.0
) -> tuple[Questions, list[str]]:
    """Prompts and accepted answers: the last answer, or "answers" of a record in the official format.

    Args:
        samples: the data.
        limit: use only the first ``limit`` records.
        judge: encodes a prompt; records that are invalid or that it refuses are skipped. None: nothing is skipped.
        max_bad_share: maximum fraction of records that may be skipped.

    Returns:
        The prompts, and an error message per skipped record.

    Raises:
        DataError: an invalid record, or no valid one.
        WorthlessError: more records are skipped than ``max_bad_share`` allows.
    """
    from finetune.encoding.sample_policy import share_is_bad
    from finetune.media import video

    questions: Questions = {}
    skipped = []
    for index in range(len(samples) if limit is None else min(limit, len(samples))):
        try:
            question = _question(samples, index)
            if judge is not None:
                judge.encode(question[0], generate=True)
                for media in question[0].media("video"):
                    video.check(media, question[0].source)
        except DataError as error:
            if judge is None:
                raise
            skipped.append(str(error))
        else:
            questions[index] = question
    if not questions:
        title = samples.title
        raise DataError(
            f"{title}: no record can be used; the first: {skipped[0]}" if skipped else f"{title}: no record"
        )
    if share_is_bad(len(skipped), len(questions) + len(skipped), max_bad_share):
        raise WorthlessError(
            f"{samples.title}: {len(skipped)} of {len(questions) + len(skipped)} records cannot be used, more than "
            f"--max_bad_share {max_bad_share:g} allows; fix the data, or raise the limit. The first: {skipped[0]}"
        )
    return questions, skipped


def _question(samples: Mixture, index: int) -> tuple[Sample, list[str]]:
    from finetune.evaluation.batched_generation import split_answer
    from finetune.readers.record_reader import check_text

    prompt, answer = split_answer(samples[index])
    answers = samples.record(index).get("answers") if samples.form_of(index) == "official" else None
    if answers is None:
        return prompt, [answer]
    if not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
        raise DataError(f"{prompt.source}: 'answers' must be a list of strings, the accepted answers")
    for answer in answers:
        check_text(answer, "'answers'", prompt.source)
    return prompt, answers
