"""``python -m finetune evaluate`` on full-duplex records: decisions with the record's own past, then free playing."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.commands.evaluation_run import (
    REPORT_ROWS,
    AnswerGenerator,
    ModelSource,
    make_encoder,
    open_answers,
    processes,
    wait_for_all,
)
from finetune.runtime.out_of_memory import explaining
from finetune.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from finetune.checkpoints.base_checkpoint import BaseCheckpoint
    from finetune.evaluation.predictions import Predictions
    from finetune.readers.mixture import Mixture
    from finetune.sample import Sample

DUPLEX = "duplex"


def is_duplex(samples: Mixture) -> bool:
    """Whether the data are full-duplex records.

    Raises:
        DataError: the first record cannot be read.
    """
    return samples.format_of(0) == DUPLEX if len(samples) else False


def run(given: argparse.Namespace, source: ModelSource, samples: Mixture) -> int:
    """Scores the records; writes predictions.jsonl, metrics.json and report.html, prints the scores; returns 0.

    Results are written batch by batch, so that an interrupted evaluation goes on; under torchrun records are divided
    among the processes.

    Raises:
        UserError: a flag without effect here, or a record that cannot be used.
    """
    _check(given)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = samples.first(given.limit)
    what = f"full duplex: {len(chosen)} records of {given.data or given.dataset}"
    with processes(world):
        store = open_answers(given, source, samples, (rank, world), what)
        with explaining(lambda: _smaller(given), "the results so far are kept: the same command continues"):
            _Evaluation(given, chosen, store, rank, world).everything(source)
        wait_for_all(world)
        if rank == 0:
            _finish(given, source, chosen, store)
    return 0


def _check(given: argparse.Namespace) -> None:
    useless = [
        flag
        for flag, set_ in {"--metric": given.metric != "auto", "--predict_only": given.predict_only}.items()
        if set_
    ]
    if useless:
        raise UserError(f"{', '.join(useless)} has no effect on full-duplex records; remove it")


def _smaller(given: argparse.Namespace) -> list[str]:
    """Flags that need less memory."""
    flags = [f"--batch_size {given.batch_size // 2}"] if given.batch_size > 1 else []
    return flags + (["--dtype bfloat16"] if given.dtype == "float32" else [])


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """The part of one process.

    Attributes:
        given: parsed command line.
        samples: the records of all processes.
        store: the results on disk.
        rank: of this process.
        world: number of processes.
    """

    given: argparse.Namespace
    samples: Mixture
    store: Predictions
    rank: int
    world: int

    def everything(self, source: ModelSource) -> None:
        """The missing results, of the model and of the one to compare with."""
        from finetune.evaluation.duplex_results import BASE_RESULT, RESULT

        given, numbers = self.given, range(len(self.samples))
        main = self.store.missing(numbers, RESULT)
        base = self.store.missing(numbers, BASE_RESULT) if source.other is not None else []
        adapter_off = given.compare == "base"
        if main or (adapter_off and base):
            model = self._load(source.base, source.adapter)
            self._play(model, source.base, main, RESULT, "records")
            if adapter_off:
                with model.disable_adapter():  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
                    self._play(model, source.base, base, BASE_RESULT, "records of the base")
            del model
        if source.other is not None and not adapter_off and base:
            self._play(self._load(source.other, None), source.other, base, BASE_RESULT, "records to compare")

    def _load(self, checkpoint: BaseCheckpoint, adapter: Any) -> nn.Module:
        return AnswerGenerator(self.given, {}, self.store, self.rank, self.world).load(checkpoint, adapter)

    def _play(self, model: nn.Module, checkpoint: BaseCheckpoint, wanted: Sequence[int], key: str, what: str) -> None:
        from tqdm.auto import tqdm

        from finetune.evaluation.duplex_results import results_of

        encoder = make_encoder(self.given, checkpoint)
        size = self.given.batch_size
        batches = [wanted[start : start + size] for start in range(0, len(wanted), size)][self.rank :: self.world]
        with tqdm(total=sum(map(len, batches)), desc=what, unit="record", disable=self.rank > 0) as bar:
            for batch in batches:
                chosen = [self.samples[index] for index in batch]
                found = results_of(model, encoder, chosen, self.given.max_new_tokens)
                self.store.add(batch, [each.to_text() for each in found], key)
                bar.update(len(batch))


def _finish(given: argparse.Namespace, source: ModelSource, chosen: Mixture, store: Predictions) -> None:
    """Scores the results of all processes, writes the three files and prints the scores."""
    from finetune.evaluation.duplex_report import build_duplex
    from finetune.evaluation.duplex_results import BASE_RESULT, RESULT, RecordResult, as_row, scores_of
    from finetune.timeline import SDK_VERSION
    from finetune.utils.json_objects import nonfinite_as_null

    samples: list[Sample] = list(chosen)
    numbers = range(len(samples))
    results = [RecordResult.from_text(text) for text in store.collect(numbers, RESULT)]
    others: list[Any] = [None] * len(samples)
    if source.other is not None:
        others = [RecordResult.from_text(text) for text in store.collect(numbers, BASE_RESULT)]
    scores, base = scores_of(samples, results), scores_of(samples, others) if source.other is not None else {}
    facts = {"model": str(source.base.folder), "adapter": str(source.adapter or ""), "prompt": source.base.duplex_name}
    facts |= {"minicpm_o5_sdk": SDK_VERSION} if source.base.duplex is not None else {}
    facts |= {"compared_with": given.compare or ""}
    summary = {"scores": scores, **({"base": base} if base else {}), **facts, "records": len(samples)}
    written = json.dumps(nonfinite_as_null(summary), indent=2, ensure_ascii=False)
    (store.folder / "metrics.json").write_text(written + "\n", encoding="utf-8")
    most = REPORT_ROWS if given.report_rows is None else given.report_rows
    title = os.path.basename(given.data) if given.data else given.dataset
    page = build_duplex(samples, results, scores, base, facts, title=title, most=most)
    (store.folder / "report.html").write_text(page, encoding="utf-8")
    store.replace(as_row(*each) for each in zip(numbers, samples, results, others, strict=True))
    for name, value in scores.items():
        print(f"{name:<18} {value:>8.4f}" + (f"   base {base[name]:.4f}" if name in base else ""))
    print(f"written    {store.folder / 'predictions.jsonl'}, metrics.json, report.html")
