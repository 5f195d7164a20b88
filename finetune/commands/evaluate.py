"""``python -m finetune evaluate``: generates answers to a data file and scores them.

The last answer of every record is the reference; the turns before it are the prompt. A record may list several accepted
answers under "answers". Writes predictions.jsonl, metrics.json and report.html. An interrupted evaluation resumes;
under torchrun the prompts are sharded over the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from finetune.arguments.data import DataArguments
from finetune.commands.parser import CommandParser
from finetune.commands.questions import Questions, read_questions
from finetune.commands.shared_flags import PLACE_FLAGS, add_flags, add_mode_flag, add_video_flags, data_arguments
from finetune.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from finetune.checkpoints.base_checkpoint import Checkpoint
    from finetune.encoding.encoder import Encoder
    from finetune.evaluation.predictions import Predictions
    from finetune.readers.mixture import Mixture


class _Thinking(TypedDict, total=False):
    enable_thinking: bool


def main(argv: list[str]) -> int:
    """Run ``python -m finetune evaluate``; returns 0 when every question was answered.

    Raises:
        UserError: invalid arguments, model or data.
    """
    given = _parser().parse_args(argv)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if given.batch_size < 1 or given.max_new_tokens < 1:
        raise UserError("--batch_size and --max_new_tokens must be at least 1")

    from finetune.evaluation.metrics import resolve_metric
    from finetune.evaluation.predictions import Predictions, start_folder

    source = _source(given)
    samples = _samples(given)
    questions, skipped = read_questions(
        samples,
        given.limit,
        cache(partial(_encoder, given, source.base)),
        skip_bad=given.on_bad_sample == "skip",
        max_bad_share=given.max_bad_share,
    )
    title = given.data or given.dataset
    metric, why = resolve_metric(given.metric, [references for _, references in questions.values()])
    folder = Path(given.data).stem if given.data else "-".join(re.findall(r"[\w.]+", given.dataset))
    out = Path(given.out) if given.out else Path("output") / f"evaluate-{folder}"
    with _processes(world):
        if rank == 0:
            start_folder(out, _settings(given, source, samples), overwrite=given.overwrite)
            print(f"metric     {metric.name} ({why}); {len(questions)} questions of {title}")
            for line in source.modes:
                print(f"mode       {line}")
            for message in skipped:
                print(f"skipped    {message}")
        _wait(world)
        store = Predictions(out, rank)
        _wait(world)
        start = time.monotonic()
        AnswerGenerator(given, questions, store, rank, world).everything(source)
        _wait(world)
        if rank == 0:
            facts = {"why": why, "model": str(source.base.folder), "adapter": str(source.adapter or ""), "data": title}
            facts |= {"left_out": str(len(skipped))} if skipped else {}
            facts |= {"compared_with": given.compare or "", "seconds": str(round(time.monotonic() - start, 1))}
            _finish(given, metric, questions, store, facts)
    return 0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The model to evaluate, and the one to compare it with.

    Attributes:
        base: the checkpoint, with the downsample_mode of the model.
        adapter: folder of its adapter.
        other: the checkpoint to compare with: the base without adapter, or another one.
    """

    base: Checkpoint
    adapter: Path | None
    other: Checkpoint | None

    @property
    def modes(self) -> list[str]:
        """The downsample_mode of the model and, where it differs, of the other one; empty for families without it."""
        mode, other = self.base.mode, self.other and self.other.mode
        said = [] if mode is None else [str(mode)]
        differs = other is not None and (mode is None or other.name != mode.name)
        return [*said, f"{other}, of the model to compare with"] if differs else said


def _source(given: argparse.Namespace) -> ModelSource:
    """The checkpoints, from a model and an adapter or from an adapter alone, which names its base.

    Raises:
        UserError: a folder is missing, or --compare base without an adapter.
    """
    from finetune.checkpoints.base_checkpoint import resolve
    from finetune.model_folders.checkpoint_folder import has_adapter, is_adapter, local_folder
    from finetune.models import base_of

    folder, adapter, mode = local_folder(given.model), given.adapter, given.downsample_mode
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
    other = None if given.compare is None else folder if given.compare == "base" else local_folder(given.compare)
    base = resolve(str(folder), mode, trained=trained)
    return ModelSource(base, trained, other and resolve(str(other), mode))


def _encoder(given: argparse.Namespace, checkpoint: Checkpoint) -> Encoder:
    """The encoder of the prompts, by the command line."""
    from finetune.encoding.encoder import Encoder
    from finetune.models import load_tokenizer

    asked = given.enable_thinking
    # None is a valid value too: when absent, the default of the family is used.
    thinking: _Thinking = {} if asked is None else {"enable_thinking": asked == "true"}
    return Encoder.from_config(
        checkpoint.family,
        load_tokenizer(checkpoint.folder),
        checkpoint.settings,
        **data_arguments(given).encoding,
        **thinking,
    )


def _samples(given: argparse.Namespace) -> Mixture:
    from finetune.readers.mixture import open_data

    return open_data(given.data, given.dataset, **data_arguments(given).reading)


def _settings(given: argparse.Namespace, source: ModelSource, samples: Mixture) -> dict[str, Any]:
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
        "enable_thinking": given.enable_thinking,
        "dtype": given.dtype,
        "states": [fingerprint(path) for path in (*folders.values(), *samples.files) if path is not None],
    }


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
            model = self._load(source.base, source.adapter)
            self._ask(model, _encoder(self.given, source.base), main, MAIN, "answers")
            if adapter_off and source.other is not None:
                with model.disable_adapter():  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
                    self._ask(model, _encoder(self.given, source.other), base, BASE, "answers of the base")
            del model
        if source.other is not None and not adapter_off and base:
            self._ask(
                self._load(source.other, None), _encoder(self.given, source.other), base, BASE, "answers to compare"
            )

    def _load(self, checkpoint: Checkpoint, adapter: Path | None) -> nn.Module:
        from finetune.models import load_model

        options: dict[str, Any] = {"dtype": self.given.dtype, "device_map": {"": _device(self.given.device)}}
        options["downsample_mode"] = checkpoint.downsample_mode
        if adapter is None:
            return load_model(checkpoint.folder, **options)
        return load_model(adapter, base=checkpoint.folder, **options)

    def _ask(self, model: nn.Module, encoder: Encoder, wanted: Sequence[int], key: str, what: str) -> None:
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


def _finish(
    given: argparse.Namespace, metric: Any, questions: Questions, store: Predictions, facts: dict[str, str]
) -> None:
    """Scores, writes the three files and prints the metrics."""
    from finetune.evaluation.evaluation_report import build, headline
    from finetune.evaluation.scoring import BASE, make_rows, summarise
    from finetune.media.image import MAX_PIXELS
    from finetune.runtime.outcome import plain_numbers

    answers = store.collect(list(questions))
    base = store.collect(list(questions), BASE) if given.compare is not None else None
    rows = make_rows(metric, questions, answers, base)
    summary = {**summarise(metric, rows), **facts}
    out = store.folder
    written = json.dumps(plain_numbers(summary), indent=2, ensure_ascii=False)
    (out / "metrics.json").write_text(written + "\n", encoding="utf-8")
    page = build(
        metric,
        rows,
        summary,
        title=headline(Path(given.data).name if given.data else given.dataset, len(rows)),
        most=given.report_rows,
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


def _processes(world: int) -> AbstractContextManager[None]:
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


def _wait(world: int) -> None:
    if world > 1:
        import torch.distributed as dist

        dist.barrier()


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m finetune evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint folder, hub id, or adapter (it names its base)")
    parser.add_argument("--adapter", help="adapter on the model")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", help="data file in any format of the training data")
    add_flags(which, DataArguments, ["dataset"])
    add_flags(parser, DataArguments, [*PLACE_FLAGS, "max_slice_nums", "image_max_pixels", "max_image_pixels"])
    add_flags(parser, DataArguments, ["on_bad_sample", "max_bad_share"])
    parser.add_argument("--metric", default="auto", help="auto, a name, package.module:function or file.py:function")
    parser.add_argument("--compare", help="base (the adapter off), or the folder of another checkpoint")
    parser.add_argument("--out", help="folder of the results (default: output/evaluate-<data>)")
    parser.add_argument("--overwrite", action="store_true", help="discard existing answers")
    parser.add_argument("--limit", type=int, help="evaluate only the first N records")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128, help="maximum length of an answer in tokens")
    parser.add_argument(
        "--enable_thinking",
        choices=["true", "false"],
        help="thinking mode, for models that have it (default: the family's)",
    )
    add_mode_flag(parser)
    add_video_flags(parser)
    parser.add_argument("--report_rows", type=int, default=300, help="number of samples in report.html, worst first")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    parser.add_argument("--dtype", default="auto", help="auto (the file's), bfloat16, float16, float32")
    return parser
