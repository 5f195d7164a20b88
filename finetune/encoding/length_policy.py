"""``LengthPolicy``: what happens to samples above max_length (``--overlong`` shrink, drop, truncate or error).

``fit`` works on the conversation and on media headers alone; ``encode`` decodes the media.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from finetune.encoding.encoder import Encoder, MediaPlan, MediaSize
from finetune.encoding.example import Example, with_rejected
from finetune.encoding.example_size import ExampleSize
from finetune.encoding.text_inputs import text_tensors
from finetune.sample import DataError, Media, Message, Part, Sample, Text
from finetune.templates.prompt_types import IGNORE, CachedPromptTokenizer, TokenizedPrompt

POLICIES = ("shrink", "drop", "truncate", "error")
Outcome = Literal["kept", "shrunk", "turns removed", "truncated"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Sizes = Sequence[MediaSize]
# Texts up to this many characters are tokenized even if they cannot fit, so that the error has the number of tokens.
_TOKENIZED = 1 << 16
Draft = tuple[Sample, tuple[MediaPlan, ...], TokenizedPrompt]


class OverlongError(DataError):
    """A sample that is skipped because the policy cannot make it fit into max_length."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A sample within max_length.

    Attributes:
        sample: the conversation that remains.
        plans: placeholders of every medium.
        rendered: token ids and labels.
        outcome: what was done; "turns removed" whenever turns were, whatever else was done.
        lost_media: number of images and other media in removed turns.
        rejected: in a preference pair, token ids and labels with the rejected answer.
    """

    sample: Sample
    plans: tuple[MediaPlan, ...]
    rendered: TokenizedPrompt
    outcome: Outcome
    lost_media: int = 0
    rejected: TokenizedPrompt | None = None

    @property
    def with_rejected_answer(self) -> Fitted | None:
        """The same prompt with the rejected answer; None for a sample that is no pair."""
        return None if self.rejected is None else replace(self, rendered=self.rejected, rejected=None)

    @property
    def labelled_tokens(self) -> int:
        """Number of tokens with a label, of a pair in both answers."""
        both = [each for each in (self.rendered, self.rejected) if each is not None]
        return sum(label != IGNORE for each in both for label in each.labels)

    @property
    def longest(self) -> int:
        """Tokens of the sample, of a pair with the longer answer."""
        return max(len(each.input_ids) for each in (self.rendered, self.rejected) if each is not None)


class LengthPolicy:
    """Fits samples into ``encoder.max_length``; the last answer is never shortened.

    ``shrink`` removes as few of the oldest turns as possible, often none, then uses the largest max_slice_nums that
    fits.
    ``truncate`` keeps the slices and removes characters from the start of system and user texts, oldest first; it
    removes as few of the oldest turns as possible, and the last question is shortened only when it is the only one
    left. A turn is removed with its answer and its media; a system turn stays. ``drop`` skips the sample. ``error``
    raises.

    Args:
        encoder: the encoder of the run.
        policy: one of POLICIES.

    Raises:
        ValueError: no such policy.
    """

    def __init__(self, encoder: Encoder, policy: str = "error") -> None:
        if policy not in POLICIES:
            raise ValueError(f"no policy {policy!r} for long samples; there are {', '.join(POLICIES)}")
        self.encoder = encoder
        self.policy = policy

    def encode(self, sample: Sample) -> tuple[Example, Outcome]:
        """The tensors of a sample, and what was done to make it fit.

        Raises:
            DataError: as ``fit``, and an image that cannot be decoded.
        """
        fitted = self.fit(sample)
        example = self.encoder.assemble(fitted.sample, fitted.plans, fitted.rendered)
        if fitted.rejected is not None:
            example = with_rejected(example, text_tensors(fitted.rejected))
        return example, fitted.outcome

    def check(self, sample: Sample) -> None:
        """Raises what ``encode`` would, without making a tensor.

        Raises:
            DataError: as ``encode``.
        """
        fitted = self.fit(sample)
        self.encoder.decode(fitted.sample, fitted.plans, fitted.rendered)

    def size_of(self, fitted: Fitted) -> ExampleSize:
        """Size of a fitted sample, of a pair with the tokens of both answers; its media count once."""
        size = self.encoder.size_of(fitted.sample, fitted.plans, fitted.rendered)
        if fitted.rejected is None:
            return size
        return replace(size, tokens=size.tokens + len(fitted.rejected.input_ids))

    def fit(self, sample: Sample) -> Fitted:
        """The sample within max_length, unchanged if it fits; of a pair both answers, behind the same prompt.

        Raises:
            OverlongError: it is skipped; the message has the reason.
            DataError: a sample that cannot be used at any length, or with ``error`` one that is too long.
        """
        if sample.rejected is None:
            return self._fit(sample)
        chosen = self._fit(replace(sample, rejected=None))
        rejected = self._with_answer(chosen, sample.rejected)
        if self.encoder.fits(rejected):
            return replace(chosen, rejected=rejected)
        # The rejected answer is the longer one: the prompt is fitted to it.
        fitted = self._fit(replace(sample, messages=(*sample.messages[:-1], sample.rejected), rejected=None))
        chosen_prompt = self._with_answer(fitted, sample.messages[-1])
        messages = (*fitted.sample.messages[:-1], sample.messages[-1])
        return replace(
            fitted, sample=replace(fitted.sample, messages=messages), rendered=chosen_prompt, rejected=fitted.rendered
        )

    def _with_answer(self, fitted: Fitted, answer: Message) -> TokenizedPrompt:
        """The fitted sample with another last answer."""
        sample = replace(fitted.sample, messages=(*fitted.sample.messages[:-1], answer))
        rendered = self.encoder.render(sample, fitted.plans)
        self.encoder.check_labels(sample, rendered)
        return rendered

    def _fit(self, sample: Sample) -> Fitted:
        encoder, attempt = self.encoder, _Attempt(self.encoder)
        sizes = encoder.sizes(sample)
        length = f"at least {min_tokens(encoder, sample)} tokens by the length of its text"
        if _letters(sample) <= _TOKENIZED or not _surely_too_long(encoder, sample):
            drafted, plans, rendered = attempt.draft(sample, sizes)
            encoder.check_labels(sample, rendered)
            if encoder.fits(rendered):
                return Fitted(drafted, plans, rendered, "kept")
            length = f"{len(rendered.input_ids)} tokens"
            if self.policy == "error":
                encoder.check_length(sample, rendered)
        if self.policy == "error":
            raise DataError(
                f"{sample.source}: {length}, the limit is {encoder.max_length}; raise model_max_length, or shorten or "
                "split the record"
            )
        fitted = self._squeezed(sample, sizes, attempt)
        if fitted is None:
            raise OverlongError(
                f"{sample.source}: skipped: {length}, the limit is {encoder.max_length}"
                f"{self._reason()}; raise model_max_length, or shorten or split the record"
            )
        if all(label == IGNORE for label in fitted.rendered.labels):
            raise OverlongError(
                f"{sample.source}: skipped: {length}, the limit is {encoder.max_length}, "
                "and no trained answer fits into it; raise model_max_length, or shorten or split the record"
            )
        return fitted

    def _reason(self) -> str:
        return {
            "shrink": ", and its last exchange alone is longer, even with one slice per image",
            "truncate": ", and the images, the answer and one word of the question of its last exchange need more",
        }.get(self.policy, " (--overlong drop)")

    def _squeezed(self, sample: Sample, sizes: Sizes, attempt: _Attempt) -> Fitted | None:
        """The sample without its oldest turns, as few as needed; None if not even the last exchange fits."""
        if self.policy == "drop" or sample.timeline is not None:  # a timeline cannot be shortened
            return None
        turns = [index for index, message in enumerate(sample.messages) if message.role == "user"]

        def rest_fits(removed: int) -> bool:
            rest, left = self._without(sample, sizes, turns[0], turns[removed])
            if self.policy == "shrink":
                return attempt.fits(rest, left, 1)
            return attempt.fits(_shortened(rest, _removable(rest)), left)

        # Every removed turn makes the rest shorter, so the smallest number is found by bisection.
        removed = bisect_left(range(len(turns)), True, key=rest_fits)
        if removed == len(turns):
            return None
        rest, left = self._without(sample, sizes, turns[0], turns[removed])
        squeeze = self._fewer_slices if self.policy == "shrink" else self._shorter_texts
        fitted = squeeze(rest, left, attempt)
        if fitted is None or not removed:
            return fitted
        return replace(fitted, outcome="turns removed", lost_media=len(sizes) - len(left))

    @staticmethod
    def _without(sample: Sample, sizes: Sizes, first: int, last: int) -> tuple[Sample, Sizes]:
        """The sample without its turns ``first`` to ``last`` (half open), and the sizes of the remaining media."""
        rest = replace(sample, messages=sample.messages[:first] + sample.messages[last:])
        # Media of a system turn, which stays, and of the turns after the removed ones.
        kept = sum(isinstance(part, Media) for message in sample.messages[:first] for part in message.parts)
        return rest, (*sizes[:kept], *sizes[len(sizes) - sum(1 for _ in rest.media()) + kept :])

    def _fewer_slices(self, sample: Sample, sizes: Sizes, attempt: _Attempt) -> Fitted | None:
        tried = None
        for slices in range(self.encoder.slicing.max_slice_nums, 0, -1):
            plans = self.encoder.plans(sizes, slices)
            if plans == tried:
                continue
            tried = plans
            drafted, _, rendered = attempt.draft(sample, sizes, slices)
            if self.encoder.fits(rendered):
                return Fitted(drafted, plans, rendered, "shrunk")
        return None

    def _shorter_texts(self, sample: Sample, sizes: Sizes, attempt: _Attempt) -> Fitted | None:
        most = _removable(sample)
        # Not strictly monotonic in the number of characters, but the result of the bisection has been checked to fit.
        least = bisect_left(
            range(most), True, key=lambda characters: attempt.fits(_shortened(sample, characters), sizes)
        )
        rest, plans, rendered = attempt.draft(_shortened(sample, least), sizes)
        question = next(message for message in reversed(rest.messages) if message.role == "user")
        if not self.encoder.fits(rendered) or not (question.text.strip() or _has_media(question)):
            return None
        return Fitted(rest, plans, rendered, "truncated")


class _Attempt:
    """Renders variants of one sample; each text is tokenized once and cached."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._prompt_tokenizer = CachedPromptTokenizer(encoder.prompt_tokenizer)

    def draft(self, sample: Sample, sizes: Sizes, slices: int | None = None) -> Draft:
        plans = self._encoder.plans(sizes, slices)
        return sample, plans, self._encoder.render(sample, plans, prompt_tokenizer=self._prompt_tokenizer)

    def fits(self, sample: Sample, sizes: Sizes, slices: int | None = None) -> bool:
        """Whether a variant fits; a text that is too long by its number of characters is not tokenized."""
        if _surely_too_long(self._encoder, sample):
            return False
        return self._encoder.fits(self.draft(sample, sizes, slices)[2])


def min_tokens(encoder: Encoder, sample: Sample) -> int:
    """Lower bound of the number of tokens of a sample, from the length of its text, without tokenizing.

    White space around turns and the thinking of answers do not count, since some templates drop them.
    """
    return encoder.prompt_tokenizer.min_tokens(map(_surely_written, sample.messages))


def _surely_too_long(encoder: Encoder, sample: Sample) -> bool:
    return encoder.max_length is not None and min_tokens(encoder, sample) > encoder.max_length


def _surely_written(message: Message) -> str:
    """The part of a turn's text that every template keeps."""
    text = message.text
    return (text.rpartition("</think>")[2] if message.role == "assistant" else text).strip()


def _letters(sample: Sample) -> int:
    return sum(len(message.text) for message in sample.messages)


def _has_media(message: Message) -> bool:
    return any(isinstance(part, Media) for part in message.parts)


def _may_truncate(sample: Sample) -> list[bool]:
    """Per message, whether its text may be truncated: prompts, and the last question only if it is the only one."""
    users = [index for index, message in enumerate(sample.messages) if message.role == "user"]
    spared = users[-1] if len(users) > 1 else -1
    return [message.role in ("system", "user") and index != spared for index, message in enumerate(sample.messages)]


def _removable(sample: Sample) -> int:
    """Number of characters that truncation may remove."""
    return sum(len(m.text) for m, may in zip(sample.messages, _may_truncate(sample), strict=True) if may)


def _shortened(sample: Sample, characters: int) -> Sample:
    """The sample with this many characters removed from its prompts, oldest first, from the start of each text."""
    messages = []
    for message, may in zip(sample.messages, _may_truncate(sample), strict=True):
        parts: list[Part] = []
        for part in message.parts:
            if may and characters and isinstance(part, Text):
                removed = min(characters, len(part.text))
                characters -= removed
                parts += [Text(part.text[removed:])] if removed < len(part.text) else []
            else:
                parts.append(part)
        messages.append(replace(message, parts=tuple(parts)))
    return replace(sample, messages=tuple(messages))
