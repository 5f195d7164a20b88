"""Samples longer than the limit: fewer slices, fewer old turns, shorter prompts, or left out, by a stated policy.

Everything here works on the conversation and on image headers; no medium is cut and no image is decoded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from finetune.encoding.encoder import Encoder, Extent, Planned
from finetune.encoding.example import Example
from finetune.sample import DataError, Media, Message, Part, Sample, Text
from finetune.templates.rendering import IGNORE, Remembered, Rendered

POLICIES = ("shrink", "drop", "truncate", "error")
Outcome = Literal["kept", "shrunk", "turns dropped", "truncated"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Sizes = Sequence[Extent]
# Texts of so many letters are tokenised though they cannot fit, so that their error has the number of tokens.
_COUNTED = 1 << 16
Draft = tuple[Sample, tuple[Planned, ...], Rendered]


class OverlongError(DataError):
    """A sample that is left out because its policy finds no way to make it fit."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A sample that is within the limit.

    Attributes:
        sample: the conversation that remains.
        plans: how every medium of it takes its place.
        rendered: its ids and labels.
        outcome: what had to give; "turns dropped" when turns did, whatever else was done.
        lost_images: images, and other media, that went with dropped turns.
    """

    sample: Sample
    plans: tuple[Planned, ...]
    rendered: Rendered
    outcome: Outcome
    lost_images: int = 0


class LengthPolicy:
    """Makes samples fit into ``encoder.max_length``; the last answer and every medium that stays are kept whole.

    ``shrink`` drops as few of the oldest turns as possible, often none, and then cuts the images into as many slices
    as fit. ``truncate`` keeps the slices and takes characters off the system and user texts, oldest first and from
    their beginning; it drops as few of the oldest turns as possible, and the last question is shortened only when it
    is the only one left. A turn is dropped together with its answer and its media; a system turn stays. ``drop``
    leaves the sample out. ``error`` stops.

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
        """The tensors of a sample, and what had to give for it.

        Raises:
            DataError: as ``fit``, and an image that cannot be decoded.
        """
        fitted = self.fit(sample)
        return self.encoder.assemble(fitted.sample, fitted.plans, fitted.rendered), fitted.outcome

    def fit(self, sample: Sample) -> Fitted:
        """The sample within the limit, as it is when it fits.

        Raises:
            OverlongError: it is left out; the message says why.
            DataError: a sample that cannot be used at any length, or with ``error`` one that is too long.
        """
        encoder, attempt = self.encoder, _Attempt(self.encoder)
        sizes = encoder.sizes(sample)
        length = f"at least {fewest(encoder, sample)} tokens by the length of its text"
        if _letters(sample) <= _COUNTED or not _surely_too_long(encoder, sample):
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
                f"{sample.source}: left out: {length}, the limit is {encoder.max_length}"
                f"{self._reason()}; raise model_max_length, or shorten or split the record"
            )
        if all(label == IGNORE for label in fitted.rendered.labels):
            raise OverlongError(
                f"{sample.source}: left out: {length}, the limit is {encoder.max_length}, "
                "and no answer that is trained fits into it; raise model_max_length, or shorten or split the record"
            )
        return fitted

    def _reason(self) -> str:
        return {
            "shrink": ", and its last exchange alone is longer, even with one slice per image",
            "truncate": ", and its last exchange needs more for its images, its answer and a word of its question",
        }.get(self.policy, " (--overlong drop)")

    def _squeezed(self, sample: Sample, sizes: Sizes, attempt: _Attempt) -> Fitted | None:
        """The sample without as few of its oldest turns as let the rest fit; None when not even the last does."""
        if self.policy == "drop":
            return None
        turns = [index for index, message in enumerate(sample.messages) if message.role == "user"]

        def rest_fits(dropped: int) -> bool:
            rest, left = self._without(sample, sizes, turns[0], turns[dropped])
            if self.policy == "shrink":
                return attempt.fits(rest, left, 1)
            return attempt.fits(_shortened(rest, _removable(rest)), left)

        # Every dropped turn makes the rest shorter, so the least number that does is found by halving.
        dropped = bisect_left(range(len(turns)), True, key=rest_fits)
        if dropped == len(turns):
            return None
        rest, left = self._without(sample, sizes, turns[0], turns[dropped])
        squeeze = self._fewer_slices if self.policy == "shrink" else self._shorter_texts
        fitted = squeeze(rest, left, attempt)
        if fitted is None or not dropped:
            return fitted
        return replace(fitted, outcome="turns dropped", lost_images=len(sizes) - len(left))

    @staticmethod
    def _without(sample: Sample, sizes: Sizes, first: int, last: int) -> tuple[Sample, Sizes]:
        """The sample without its turns ``first`` to ``last`` (half open), and the sizes of the media that remain."""
        rest = replace(sample, messages=sample.messages[:first] + sample.messages[last:])
        # Of a system turn in front, which stays, and of what is behind the dropped turns.
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
        # Tokens do not fall with every character, but what halving ends at has been seen to fit.
        least = bisect_left(
            range(most), True, key=lambda characters: attempt.fits(_shortened(sample, characters), sizes)
        )
        rest, plans, rendered = attempt.draft(_shortened(sample, least), sizes)
        question = next(message for message in reversed(rest.messages) if message.role == "user")
        if not self.encoder.fits(rendered) or not (question.text.strip() or _has_media(question)):
            return None
        return Fitted(rest, plans, rendered, "truncated")


class _Attempt:
    """Drafts of one sample: each of its texts is tokenised once, however many drafts have it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._vocabulary = Remembered(encoder.vocabulary)

    def draft(self, sample: Sample, sizes: Sizes, slices: int | None = None) -> Draft:
        plans = self._encoder.plans(sizes, slices)
        return sample, plans, self._encoder.render(sample, plans, vocabulary=self._vocabulary)

    def fits(self, sample: Sample, sizes: Sizes, slices: int | None = None) -> bool:
        """Whether a draft fits; one whose length tells that it does not is not made."""
        if _surely_too_long(self._encoder, sample):
            return False
        return self._encoder.fits(self.draft(sample, sizes, slices)[2])


def fewest(encoder: Encoder, sample: Sample) -> int:
    """A number of tokens that a sample has at least, from the length of its text; nothing is tokenised.

    White space around turns and the thinking of answers are left out of it, as some templates leave them out.
    """
    return encoder.vocabulary.fewest(map(_surely_written, sample.messages))


def _surely_too_long(encoder: Encoder, sample: Sample) -> bool:
    return encoder.max_length is not None and fewest(encoder, sample) > encoder.max_length


def _surely_written(message: Message) -> str:
    """The part of a turn's text that every template writes."""
    text = message.text
    return (text.rpartition("</think>")[2] if message.role == "assistant" else text).strip()


def _letters(sample: Sample) -> int:
    return sum(len(message.text) for message in sample.messages)


def _has_media(message: Message) -> bool:
    return any(isinstance(part, Media) for part in message.parts)


def _may_shrink(sample: Sample) -> list[bool]:
    """Per message whether its text may be shortened: prompts, but the last question only when it is alone."""
    users = [index for index, message in enumerate(sample.messages) if message.role == "user"]
    spared = users[-1] if len(users) > 1 else -1
    return [message.role in ("system", "user") and index != spared for index, message in enumerate(sample.messages)]


def _removable(sample: Sample) -> int:
    """Characters that truncation may take."""
    return sum(len(m.text) for m, may in zip(sample.messages, _may_shrink(sample), strict=True) if may)


def _shortened(sample: Sample, characters: int) -> Sample:
    """The sample with so many characters taken off its prompts, oldest first and from the beginning of each text."""
    messages = []
    for message, may in zip(sample.messages, _may_shrink(sample), strict=True):
        parts: list[Part] = []
        for part in message.parts:
            if may and characters and isinstance(part, Text):
                taken = min(characters, len(part.text))
                characters -= taken
                parts += [Text(part.text[taken:])] if taken < len(part.text) else []
            else:
                parts.append(part)
        messages.append(replace(message, parts=tuple(parts)))
    return replace(sample, messages=tuple(messages))
