"""``python -m finetune evaluate``: generates answers to a data file and scores them.

The last answer of every record is the reference; the turns before it are the prompt. A record may list several accepted
answers under "answers". Writes predictions.jsonl, metrics.json and report.html; with --predict_only, for records
without answers, predictions.jsonl alone. An interrupted evaluation resumes; under torchrun the prompts are sharded over
the ranks. With --url a server answers, many requests at once.

Full-duplex records get scores of their own: accuracy and margin of each kind of decision with the record's own past,
then turns, delay and text when the model plays them freely, second by second.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import cache, partial

from finetune.arguments.data import DataArguments
from finetune.arguments.model import ModelArguments
from finetune.commands import evaluate_duplex, evaluate_served
from finetune.commands.evaluation_run import (
    REPORT_ROWS,
    AnswerGenerator,
    facts_of,
    make_encoder,
    open_answers,
    open_samples,
    processes,
    read_all,
    source_of,
    wait_for_all,
    write_results,
)
from finetune.commands.parser import CommandParser
from finetune.commands.shared_flags import PLACE_FLAGS, add_flags, add_prompt_flags, add_video_flags
from finetune.runtime.out_of_memory import explaining, fewer_slices
from finetune.utils.errors import UserError


def main(argv: list[str]) -> int:
    """Run ``python -m finetune evaluate``; returns 0 when every question was answered.

    Raises:
        UserError: invalid arguments, model or data.
    """
    parser = build_parser()
    given = parser.parse_args(argv)
    evaluate_served.check_flags(given, parser)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _check_flags(given)
    if given.url is not None:
        if world > 1:
            raise UserError("--url needs one process: --concurrency sends many requests at once")
        return evaluate_served.run(given)

    from finetune.evaluation.metrics import resolve_metric

    source = source_of(given)
    samples = open_samples(given)
    if evaluate_duplex.is_duplex(samples):
        return evaluate_duplex.run(given, source, samples)
    questions, skipped = read_all(given, samples, cache(partial(make_encoder, given, source.base)))
    title = given.data or given.dataset
    metric, why = None, "--predict_only"
    if not given.predict_only:
        metric, why = resolve_metric(given.metric, [references for _, references in questions.values()])
    what = f"metric     {metric.name if metric else 'none'} ({why}); {len(questions)} questions of {title}"
    with processes(world):
        left_out = [f"skipped    {message}" for message in skipped]
        store = open_answers(given, source, samples, (rank, world), what, left_out)
        start = time.monotonic()
        with explaining(lambda: _smaller(given), "the answers so far are kept: the same command continues"):
            AnswerGenerator(given, questions, store, rank, world).everything(source)
        wait_for_all(world)
        if rank == 0:
            model = {"model": str(source.base.folder), "adapter": str(source.adapter or "")}
            facts = {"why": why, **model, "data": title, **facts_of(skipped, given.compare, start)}
            write_results(given, metric, questions, store, facts)
    return 0


def _check_flags(given: argparse.Namespace) -> None:
    if given.batch_size < 1 or given.max_new_tokens < 1:
        raise UserError("--batch_size and --max_new_tokens must be at least 1")
    if given.predict_only and (given.metric != "auto" or given.report_rows is not None):
        raise UserError("--predict_only scores nothing: --metric and --report_rows have no effect, remove them")


def _smaller(given: argparse.Namespace) -> list[str]:
    """Flags that need less memory than the given ones, the cheapest first."""
    flags = [f"--batch_size {given.batch_size // 2}"] if given.batch_size > 1 else []
    flags += ["--dtype bfloat16"] if given.dtype == "float32" else []
    flags += [fewer_slices(given.max_slice_nums)] if given.max_slice_nums != 1 else []
    return flags


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder, hub id, or adapter (it names its base)")
    parser.add_argument("--adapter", help="adapter on the model")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", help="data file in any format of the training data")
    add_flags(which, DataArguments, ["dataset"])
    add_flags(parser, DataArguments, [*PLACE_FLAGS, "max_slice_nums", "image_max_pixels", "max_image_pixels"])
    add_flags(parser, DataArguments, ["on_bad_sample", "max_bad_share"])
    parser.add_argument("--metric", default="auto", help="auto, a name, package.module:function or file.py:function")
    parser.add_argument(
        "--predict_only", action="store_true", help="only answer the last user turns; records need no answers"
    )
    parser.add_argument(
        "--compare", help="base (the adapter off), or another checkpoint; with --url the one that is served"
    )
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
    add_prompt_flags(parser)
    add_flags(parser, ModelArguments, ["duplex_prompt"])
    evaluate_served.add_server_flags(parser)
    add_video_flags(parser)
    parser.add_argument(
        "--report_rows", type=int, help=f"number of samples in report.html, worst first (default: {REPORT_ROWS})"
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, ...")
    parser.add_argument("--dtype", default="auto", help="auto (the file's), bfloat16, float16, float32")
    return parser
