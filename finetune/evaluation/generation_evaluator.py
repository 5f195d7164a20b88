"""Generates and scores answers to evaluation samples at every evaluation of a training (--eval_generate)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from torch import nn

from finetune.encoding.encoder import Encoder
from finetune.evaluation.batched_generation import answer_batch, batches_by_length, split_answer
from finetune.evaluation.metrics import resolve_metric
from finetune.sample import DataError, Sample

logger = logging.getLogger(__name__)


class GeneratedAnswers(NamedTuple):
    """A question with its reference and the generated answers.

    Attributes:
        prompt: the conversation up to the question.
        reference: the answer of the data.
        answers: those of the first and the latest evaluation, by optimizer step.
    """

    prompt: Sample
    reference: str
    answers: dict[int, str]


class GenerationEvaluator:
    """Generates answers to some evaluation samples and scores them.

    Args:
        samples: the evaluation set; ``count`` of them, evenly spaced, are used.
        encoder: that of the run; its maximum length is not applied, because nothing is trained.
        count: number of samples.
        metric: as in ``resolve_metric``.
        max_new_tokens: maximum number of tokens per answer.
        batch_size: per process.
        skip_bad: skip invalid samples instead of raising.

    Raises:
        MetricError: no such metric.
        DataError: an invalid sample, or no valid one.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        *,
        count: int,
        metric: str = "auto",
        max_new_tokens: int = 64,
        batch_size: int = 1,
        skip_bad: bool = False,
    ) -> None:
        self._encoder = copy.copy(encoder)
        self._encoder.max_length = None
        self._length, self._size = max_new_tokens, batch_size
        self._pairs = self._choose(samples, count, skip_bad)
        self.metric, why = resolve_metric(metric, [[answer] for _, answer in self._pairs])
        self.answered = [GeneratedAnswers(prompt, reference, {}) for prompt, reference in self._pairs]
        logger.info("eval_%s (%s) on %d evaluation samples", self.metric.name, why, len(self._pairs))

    def _choose(self, samples: Sequence[Sample], count: int, skip_bad: bool) -> list[tuple[Sample, str]]:
        pairs = []
        number = min(count, len(samples))
        for place in range(number):
            try:
                # A tool call is compared as the text that the model writes for it.
                pair = split_answer(self._encoder.tools.expand(samples[place * len(samples) // number]))
                if skip_bad:
                    # Every rank must choose the same samples, so all of them detect damaged images now.
                    self._encoder.encode(pair[0], generate=True)
            except DataError as error:
                if not skip_bad:
                    raise
                logger.warning("skipped in eval_generate: %s", error)
            else:
                pairs.append(pair)
        if not pairs:
            raise DataError("--eval_generate: none of the chosen evaluation samples can be used")
        return pairs

    def __call__(
        self, model: nn.Module, *, rank: int = 0, world: int = 1, synced: bool = False, step: int = 0
    ) -> dict[str, float]:
        """Metrics over all samples; every rank must call this, and gets the same.

        Args:
            model: the unwrapped model.
            rank: of this process.
            world: number of ranks that the samples are sharded over.
            synced: every decoding step waits for all ranks, as ZeRO-3 requires.
            step: optimizer step, for ``answered``.
        """
        mine = self._pairs[rank::world] or self._pairs[:1]
        prompts = [prompt for prompt, _ in mine]
        batches = batches_by_length(self._encoder, prompts, self._size)
        # Under ZeRO-3 every rank must generate as often as the others; answers to repeated samples are dropped.
        rounds = math.ceil(math.ceil(len(self._pairs) / world) / self._size)
        given: list[tuple[int, str]] = []
        for number in range(rounds):
            batch = batches[min(number, len(batches) - 1)]
            texts = answer_batch(
                model,
                self._encoder.tokenizer,
                self._encoder,
                [prompts[place] for place in batch],
                max_new_tokens=self._length,
                synced=synced,
            )
            if number < len(batches) and rank < len(self._pairs):
                given += zip((rank + place * world for place in batch), texts, strict=True)
        return self._scored(sorted(gather_object(given)) if world > 1 else given, step)

    def _scored(self, given: Sequence[tuple[int, str]], step: int) -> dict[str, float]:
        """Metrics of answers by question number; the answers are kept until the next evaluation."""
        for place, text in given:
            known = self.answered[place].answers
            for former in list(known)[1:]:
                del known[former]
            known[step] = text
        return self.metric.combine([self.metric.figures(text, [self._pairs[place][1]]) for place, text in given])


def make_generation_evaluator(args: Any, dataset: Any, *, sharded: bool) -> GenerationEvaluator | None:
    """The evaluator of --eval_generate; made before training, so that an unknown name fails early.

    Args:
        args: the training flags.
        dataset: the evaluation set with its sample policy; None for none.
        sharded: whether ZeRO-3 shards the weights.
    """
    if not args.eval_generate or dataset is None:
        return None
    if sharded and not args.eval_generate_zero3:
        logger.warning(
            "--eval_generate is skipped: under ZeRO-3 every generated token gathers all weights; "
            "--eval_generate_zero3 true enables it"
        )
        return None
    return GenerationEvaluator(
        dataset.samples,
        dataset.sample_policy.length_policy.encoder,
        count=args.eval_generate,
        metric=args.eval_metric,
        max_new_tokens=args.eval_max_new_tokens,
        batch_size=args.per_device_eval_batch_size,
        skip_bad=dataset.sample_policy.on_bad_sample == "skip",
    )
