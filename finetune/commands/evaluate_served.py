"""``python -m finetune evaluate --url``: scores a server's answers; --compare also compares them with a local model."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.commands import evaluation_run
from finetune.commands.questions import Questions
from finetune.utils.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from finetune.encoding.encoder import Encoder
    from finetune.evaluation.predictions import Predictions
    from finetune.evaluation.served_model import ServedModel
    from finetune.readers.mixture import Mixture

TOLD, COMPARISON = "served.jsonl", "comparison.jsonl"
# Flags that only change the prompts or the run of a model here.
_OF_A_MODEL = ("adapter", "max_slice_nums", "downsample_mode", "use_image_id", "enable_thinking")
_OF_A_RUN = ("device", "dtype", "batch_size")
# Flags that only --url has.
_OF_A_SERVER = ("served_model", "concurrency", "tolerance")
CONCURRENCY, TOLERANCE = 16, 0.1


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --url and the flags that go with it."""
    group = parser.add_argument_group("a served model")
    group.add_argument("--url", help="of a server with the chat completions protocol, e.g. http://127.0.0.1:8000/v1")
    group.add_argument("--served_model", help="its name at the server (default: the only one)")
    group.add_argument("--concurrency", type=int, help=f"requests at once (default: {CONCURRENCY})")
    group.add_argument(
        "--tolerance",
        type=float,
        help="with --compare: largest difference of first-token log-probabilities that counts as the same "
        f"(default: {TOLERANCE})",
    )


def check_flags(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses flags without effect, and a missing model.

    Raises:
        ArgumentError: there are some.
    """
    if given.url is None:
        if given.model is None:
            parser.error("--model is missing: a checkpoint folder, a hub id or an adapter; or --url of a server")
        if unused := [f"--{name}" for name in _OF_A_SERVER if getattr(given, name) is not None]:
            raise ArgumentError(f"{', '.join(unused)}: no effect without --url; remove it")
        return
    if given.compare == "base":
        raise ArgumentError("--compare base is the model here without its adapter: with --url give --compare MODEL")
    if given.compare and given.model:
        raise ArgumentError("--url with --compare MODEL takes prompts and answers from that model: remove --model")
    idle = [] if given.compare else list(_OF_A_RUN)
    idle += [] if given.compare or given.model else list(_OF_A_MODEL)
    unused = [name for name in idle if getattr(given, name) != parser.get_default(name)]
    unused += [] if given.compare or given.tolerance is None else ["tolerance"]
    if unused:
        names = ", ".join(f"--{name}" for name in unused)
        raise ArgumentError(
            f"{names}: no effect on a server; remove it, or compare with a model here by --compare MODEL"
        )


def run(given: argparse.Namespace) -> int:
    """Evaluates a served model; returns 0, or 3 when it is compared and not the same.

    Raises:
        UserError: invalid data or model, no server, or a request that it refuses.
    """
    from finetune.evaluation.metrics import resolve_metric
    from finetune.evaluation.predictions import Predictions, start_folder

    given.model, wanted = given.compare or given.model, given.compare
    plain = argparse.Namespace(**{**vars(given), "compare": None})
    source = None if given.model is None else evaluation_run.source_of(plain)
    samples = evaluation_run.open_samples(given)
    encoder = cache(lambda: _encoder(given, source))
    questions, skipped = evaluation_run.read_all(given, samples, encoder)
    metric, why = (
        (None, "--predict_only")
        if given.predict_only
        else resolve_metric(given.metric, [references for _, references in questions.values()])
    )
    server = _server(given, None if source is None else encoder())
    out = evaluation_run.out_folder(given)
    start_folder(out, _settings(given, source, samples, server), overwrite=given.overwrite)
    if given.overwrite:
        (out / TOLD).unlink(missing_ok=True)
    title = given.data or given.dataset
    print(f"metric     {metric.name if metric else 'none'} ({why}); {len(questions)} questions of {title}")
    print(f"server     {given.url}, {server.name}{f' ({server.kind})' if server.kind else ''}")
    for line in skipped:
        print(f"skipped    {line}")
    if source is None and server.kind:
        print("note: --model or --compare names the checkpoint, by which prompts are written as in training")
    store, start = Predictions(out), time.monotonic()
    _ask_all(server, questions, store, given.concurrency or CONCURRENCY)
    status = 0 if wanted is None else _compare(given, plain, source, questions, store)
    facts = {"why": why, "model": f"{server.name} at {given.url}", "adapter": "", "data": title}
    facts |= evaluation_run.facts_of(skipped, wanted, start)
    evaluation_run.write_results(given, metric, questions, Predictions(out), facts)
    return status


def _encoder(given: argparse.Namespace, source: evaluation_run.ModelSource | None) -> Encoder:
    if source is None:
        raise UserError("records with tools need --model, whose chat template writes them, or --compare")
    return evaluation_run.make_encoder(given, source.base)


def _server(given: argparse.Namespace, encoder: Encoder | None) -> ServedModel:
    from finetune.evaluation.served_model import ServedModel
    from finetune.export.prompt_files import thinking_options

    return ServedModel(
        given.url,
        given.served_model,
        encoder,
        options={} if encoder is None else thinking_options(encoder),
        details=given.compare is not None,
        max_new_tokens=given.max_new_tokens,
        refuse_above_pixels=given.max_image_pixels,
        max_pixels=given.image_max_pixels,
    )


def _settings(
    given: argparse.Namespace, source: evaluation_run.ModelSource | None, samples: Mixture, server: ServedModel
) -> dict[str, Any]:
    """Settings that the answers depend on; a resumed evaluation must have the same."""
    from finetune.evaluation.predictions import fingerprint

    own = {} if source is None else evaluation_run.settings_of(given, source, samples)
    files = [fingerprint(path) for path in samples.files]
    data = str(Path(given.data).resolve()) if given.data else samples.fingerprint
    served = {"url": given.url, "served_model": server.name, "kind": server.kind, "compared": given.compare is not None}
    return {"data": data, "max_new_tokens": given.max_new_tokens, "states": files, **own, **served}


def _ask_all(server: ServedModel, questions: Questions, store: Predictions, concurrency: int) -> None:
    """Asks for the missing answers, several at once; each is written as it comes."""
    from tqdm.auto import tqdm

    missing = store.missing(questions)
    pool = ThreadPoolExecutor(concurrency)
    try:
        asked = {pool.submit(server.answer, questions[index][0]): index for index in missing}
        for done in tqdm(as_completed(asked), total=len(missing), desc="answers of the server", unit="sample"):
            index, answer = asked[done], done.result()
            if server.details:
                with (store.folder / TOLD).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"index": index, **answer.as_json()}) + "\n")
            store.add([index], [answer.text])
    finally:
        pool.shutdown(cancel_futures=True)


def _compare(
    given: argparse.Namespace,
    plain: argparse.Namespace,
    source: evaluation_run.ModelSource | None,
    questions: Questions,
    store: Predictions,
) -> int:
    """Asks the model here too, writes comparison.jsonl and prints the status; 3 when it is not the same."""
    from finetune.evaluation.predictions import MAIN, Predictions
    from finetune.evaluation.scoring import BASE
    from finetune.evaluation.served_comparison import compare_sample, verdict
    from finetune.runtime.outcome import NOT_VERIFIED, OK

    assert source is not None  # --compare names it
    generator = evaluation_run.AnswerGenerator(plain, questions, store, 0, 1)
    model, encoder = generator.load(source.base, source.adapter), evaluation_run.make_encoder(given, source.base)
    generator.ask(model, encoder, store.missing(questions, BASE), BASE, "answers here")
    after, indices = Predictions(store.folder), list(questions)
    answers = zip(after.collect(indices, MAIN), after.collect(indices, BASE), strict=True)
    told = _told(store.folder)
    rows = [
        compare_sample(model, encoder, index, questions[index][0], told.get(index, {}), pair)
        for index, pair in zip(indices, answers, strict=True)
    ]
    _write(store.folder / COMPARISON, [asdict(row) for row in rows])
    status, figures = verdict(rows, TOLERANCE if given.tolerance is None else given.tolerance)
    print(f"compared   {status}: {figures}; each in {store.folder / COMPARISON}")
    return OK if status in ("same", "unknown") else NOT_VERIFIED


def _told(folder: Path) -> dict[int, dict[str, Any]]:
    """What the server said of each prompt; an incomplete line of a killed run is dropped."""
    from finetune.evaluation.predictions import whole_lines

    path = folder / TOLD
    return {line["index"]: line for line in whole_lines(path)} if path.is_file() else {}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
