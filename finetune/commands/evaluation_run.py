"""Helpers of the ``evaluate`` command: load model and data, generate answers with a local model, write the results."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from finetune.commands.questions import Questions, read_questions
from finetune.commands.shared_flags import data_arguments
from finetune.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from finetune.checkpoints.base_checkpoint import BaseCheckpoint
    from finetune.encoding.encoder import Encoder
    from finetune.evaluation.predictions import Predictions
    from finetune.readers.mixture import Mixture


REPORT_ROWS = 300


class _Thinking(TypedDict, total=False):
    enable_thinking: bool


def read_all(
    given: argparse.Namespace, samples: Mixture, encoder: Callable[[], Encoder]
) -> tuple[Questions, list[str]]:
    """The questions of the data, and what is wrong with each record that was skipped."""
    return read_questions(
        samples,
        given.limit,
        encoder,
        skip_bad=given.on_bad_sample == "skip",
        max_bad_share=given.max_bad_share,
        answered=not given.predict_only,
    )


def out_folder(given: argparse.Namespace) -> Path:
    """The folder of the results."""
    folder = Path(given.data).stem if given.data else "-".join(re.findall(r"[\w.]+", given.dataset))
    return Path(given.out) if given.out else Path("output") / f"evaluate-{folder}"


def open_answers(
    given: argparse.Namespace,
    source: ModelSource,
    samples: Mixture,
    ranks: tuple[int, int],
    title: str,
    notes: Sequence[str] = (),
) -> Predictions:
    """The answers of an interrupted evaluation, or none; rank 0 prints what is evaluated.

    Every process must call it, and waits until all have read what there is.

    Args:
        given: parsed command line.
        source: the model.
        samples: the data.
        ranks: rank of this process, and number of processes.
        title: first line to print.
        notes: lines to print after the modes of the model.
    """
    from finetune.evaluation.predictions import Predictions, start_folder

    (rank, world), out = ranks, out_folder(given)
    if rank == 0:
        start_folder(out, settings_of(given, source, samples), overwrite=given.overwrite)
        print("\n".join([title, *(f"mode       {line}" for line in source.modes), *notes]))
    wait_for_all(world)
    store = Predictions(out, rank)
    wait_for_all(world)
    return store


def facts_of(skipped: Sequence[str], compared_with: str | None, start: float) -> dict[str, str]:
    """What metrics.json says of an evaluation: records left out, the model compared with, seconds since ``start``."""
    left_out = {"left_out": str(len(skipped))} if skipped else {}
    return {**left_out, "compared_with": compared_with or "", "seconds": str(round(time.monotonic() - start, 1))}


def write_results(
    given: argparse.Namespace, metric: Any, questions: Questions, store: Predictions, facts: dict[str, str]
) -> None:
    """Writes the final files and prints the metrics; without a metric the answers alone."""
    if metric is None:
        _write_predictions(given, questions, store)
    else:
        _finish(given, metric, questions, store, facts)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The model to evaluate, and the one to compare it with.

    Attributes:
        base: the checkpoint, with the downsample_mode and image ids of the model.
        adapter: folder of its adapter.
        other: the checkpoint to compare with: the base without adapter, or another one.
    """

    base: BaseCheckpoint
    adapter: Path | None
    other: BaseCheckpoint | None

    @property
    def modes(self) -> list[str]:
        """Mode and image ids of the model, as far as they are to be said, and of the other one where it differs."""
        said = self.base.choices
        others = [] if self.other is None else [line for line in self.other.choices if line not in said]
        return [*said, *(f"{line}, of the model to compare with" for line in others)]


def source_of(given: argparse.Namespace) -> ModelSource:
    """The checkpoints, from a model and an adapter or from an adapter alone, which names its base.

    Raises:
        UserError: a folder is missing, or --compare base without an adapter.
    """
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.model_folders.checkpoint_folder import has_adapter, is_adapter, resolve_folder
    from finetune.models import base_of

    folder, adapter, mode = resolve_folder(given.model), given.adapter, given.downsample_mode
    if is_adapter(folder):
        if adapter is not None:
            raise UserError(
                f"--model {given.model} is an adapter, and --adapter {adapter} another one; give one of them"
            )
        adapter, folder = str(folder), base_of(folder)
    if adapter is not None and not has_adapter(Path(adapter)):
        raise UserError(f"--adapter {adapter}: no adapter_config.json there; give the folder that training wrote")
    if given.compare == "base" and adapter is None:
        raise UserError("--compare base means the model without its adapter: give --adapter, or --compare FOLDER")
    trained = None if adapter is None else Path(adapter).resolve()
    other = None if given.compare is None else folder if given.compare == "base" else resolve_folder(given.compare)
    wished = {"use_image_id": given.use_image_id, "duplex_prompt": given.duplex_prompt}
    base = resolve_base(str(folder), mode, **wished, trained=trained)
    return ModelSource(base, trained, other and resolve_base(str(other), mode, **wished))


def make_encoder(given: argparse.Namespace, checkpoint: BaseCheckpoint) -> Encoder:
    """The encoder of the prompts, by the command line."""
    from finetune.encoding.encoder import Encoder
    from finetune.models import load_tokenizer

    asked = given.enable_thinking
    # None is a valid value too: when absent, the default of the family is used.
    thinking: _Thinking = {} if asked is None else {"enable_thinking": asked == "true"}
    return Encoder(
        checkpoint.family,
        load_tokenizer(checkpoint.folder, duplex_prompt=checkpoint.duplex_name),
        checkpoint.settings,
        duplex=checkpoint.duplex_name,
        **data_arguments(given).encoding,
        **thinking,
    )


def open_samples(given: argparse.Namespace) -> Mixture:
    """The data of the command line."""
    from finetune.readers.mixture import open_data

    return open_data(given.data, given.dataset, **data_arguments(given).reading)


def settings_of(given: argparse.Namespace, source: ModelSource, samples: Mixture) -> dict[str, Any]:
    """Settings that the answers depend on; a resumed evaluation must have the same."""
    from finetune.evaluation.predictions import fingerprint

    other = None if source.other is None or given.compare == "base" else source.other.folder
    folders = {"model": source.base.folder, "adapter": source.adapter, "compared_with": other}
    mode = source.base.mode
    return {
        **{name: None if path is None else str(path) for name, path in folders.items()},
        "data": str(Path(given.data).resolve()) if given.data else samples.fingerprint,
        "max_new_tokens": given.max_new_tokens,
        "max_slice_nums": given.max_slice_nums,
        "image_max_pixels": given.image_max_pixels,
        "video": data_arguments(given).video_options.given,
        # A mode read from files is part of their fingerprint.
        "downsample_mode": mode.name if mode is not None and mode.chosen else None,
        "use_image_id": given.use_image_id,
        "duplex_prompt": given.duplex_prompt,
        "enable_thinking": given.enable_thinking,
        "dtype": given.dtype,
        "states": [fingerprint(path) for path in (*folders.values(), *samples.files) if path is not None],
    }


def processes(world: int) -> AbstractContextManager[None]:
    """Process group of torchrun; only barriers are needed, so gloo is enough."""
    if world == 1:
        return nullcontext()
    from contextlib import contextmanager
    from datetime import timedelta

    import torch.distributed as dist

    @contextmanager
    def connected() -> Any:
        # A rank may take much longer than the others.
        dist.init_process_group("gloo", timeout=timedelta(days=2))
        try:
            yield
        finally:
            dist.destroy_process_group()

    return connected()


def wait_for_all(world: int) -> None:
    """Waits until every process is here."""
    if world > 1:
        import torch.distributed as dist

        dist.barrier()


@dataclass(frozen=True, slots=True)
class AnswerGenerator:
    """Generates answers on one rank.

    Attributes:
        given: parsed command line.
        questions: those of all ranks.
        store: the answers on disk.
        rank: of this process.
        world: number of processes.
    """

    given: argparse.Namespace
    questions: Questions
    store: Predictions
    rank: int
    world: int

    def everything(self, source: ModelSource) -> None:
        """Generates the missing answers, of the model and of the one to compare with."""
        from finetune.evaluation.predictions import MAIN
        from finetune.evaluation.scoring import BASE

        adapter_off = self.given.compare == "base"
        main = self.store.missing(self.questions)
        base = self.store.missing(self.questions, BASE) if self.given.compare is not None else []
        if main or (adapter_off and base):
            model = self.load(source.base, source.adapter)
            self.ask(model, make_encoder(self.given, source.base), main, MAIN, "answers")
            if adapter_off and source.other is not None:
                with model.disable_adapter():  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
                    self.ask(model, make_encoder(self.given, source.other), base, BASE, "answers of the base")
            del model
        if source.other is not None and not adapter_off and base:
            self.ask(
                self.load(source.other, None), make_encoder(self.given, source.other), base, BASE, "answers to compare"
            )

    def load(self, checkpoint: BaseCheckpoint, adapter: Path | None) -> nn.Module:
        """A model, with its adapter."""
        from finetune.models import load_model
        from finetune.models.duplex_rows import add_duplex_rows

        options: dict[str, Any] = {"dtype": self.given.dtype, "device_map": {"": _device(self.given.device)}}
        options["downsample_mode"] = checkpoint.downsample_mode
        if adapter is None:
            model = load_model(checkpoint.folder, **options)
            if checkpoint.duplex is not None:
                add_duplex_rows(model)
            return model
        return load_model(adapter, base=checkpoint.folder, **options)

    def ask(self, model: nn.Module, encoder: Encoder, wanted: Sequence[int], key: str, what: str) -> None:
        """Generates the answers to some questions and stores them under a key."""
        from tqdm.auto import tqdm

        from finetune.evaluation.batched_generation import answer_batch, batches_by_length

        prompts = [self.questions[index][0] for index in wanted]
        # Strided over the ranks: batches are sorted by length, so every rank gets as many long ones as short ones.
        batches = batches_by_length(encoder, prompts, self.given.batch_size)[self.rank :: self.world]
        longest = self.given.max_new_tokens
        with tqdm(total=sum(map(len, batches)), desc=what, unit="sample", disable=self.rank > 0) as bar:
            for batch in batches:
                chosen = [prompts[place] for place in batch]
                texts = answer_batch(model, encoder.tokenizer, encoder, chosen, max_new_tokens=longest)
                self.store.add([wanted[place] for place in batch], texts, key)
                bar.update(len(batch))


def _write_predictions(given: argparse.Namespace, questions: Questions, store: Predictions) -> None:
    """Writes predictions.jsonl without scores."""
    from finetune.evaluation.scoring import BASE, UnscoredRow

    indices = list(questions)
    answers = store.collect(indices)
    base = store.collect(indices, BASE) if given.compare is not None else [None] * len(indices)
    rows = zip(indices, answers, base, strict=True)
    store.replace(UnscoredRow(index, questions[index][0], answer, other).as_json() for index, answer, other in rows)
    print(f"written    {store.folder / 'predictions.jsonl'}, {len(indices)} answers without scores")


def _finish(
    given: argparse.Namespace, metric: Any, questions: Questions, store: Predictions, facts: dict[str, str]
) -> None:
    """Scores, writes the three files and prints the metrics."""
    from finetune.evaluation.evaluation_report import build, headline
    from finetune.evaluation.scoring import BASE, make_rows, summarise
    from finetune.media.image import MAX_PIXELS
    from finetune.utils.json_objects import nonfinite_as_null

    answers = store.collect(list(questions))
    base = store.collect(list(questions), BASE) if given.compare is not None else None
    rows = make_rows(metric, questions, answers, base)
    summary = {**summarise(metric, rows), **facts}
    out = store.folder
    written = json.dumps(nonfinite_as_null(summary), indent=2, ensure_ascii=False)
    (out / "metrics.json").write_text(written + "\n", encoding="utf-8")
    page = build(
        metric,
        rows,
        summary,
        title=headline(Path(given.data).name if given.data else given.dataset, len(rows)),
        most=REPORT_ROWS if given.report_rows is None else given.report_rows,
        max_pixels=MAX_PIXELS,
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    store.replace(row.as_json() for row in rows)
    for name, value in summary["scores"].items():
        print(f"{name:<12} {value:.4f}" + (f"   base {summary['base'][name]:.4f}" if base is not None else ""))
    if base is not None:
        print(f"{summary['better']} better, {summary['worse']} worse, {summary['other_answer']} answers differ")
    print(f"written    {out / 'predictions.jsonl'}, metrics.json, report.html")


def _device(asked: str) -> str:
    import torch

    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
