"""``python -m finetune evaluate`` on full-duplex records: decisions with the record's own past, then free playing."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.commands.evaluation_run import AnswerGenerator, ModelSource, make_encoder, out_folder, settings_of
from finetune.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from finetune.encoding.encoder import Encoder
    from finetune.readers.mixture import Mixture
    from finetune.sample import Sample

DUPLEX = "duplex"


def is_duplex(samples: Mixture) -> bool:
    """Whether the data are full-duplex records.

    Raises:
        DataError: the first record cannot be read.
    """
    return samples.form_of(0) == DUPLEX if len(samples) else False


def run(given: argparse.Namespace, source: ModelSource, samples: Mixture) -> int:
    """Scores the records, writes predictions.jsonl and metrics.json, prints the scores; returns 0.

    Raises:
        UserError: a flag without effect here, or a record that cannot be used.
    """
    from finetune.evaluation.predictions import PREDICTIONS, start_folder
    from finetune.runtime.outcome import plain_numbers

    _check(given)
    encoder = make_encoder(given, source.base)
    chosen = [samples[index] for index in range(min(len(samples), given.limit or len(samples)))]
    out = out_folder(given)
    start_folder(out, settings_of(given, source, samples), overwrite=given.overwrite)
    print(f"full duplex: {len(chosen)} records of {given.data or given.dataset}")
    model = AnswerGenerator(given, {}, None, 0, 1).load(source.base, source.adapter)  # pyright: ignore[reportArgumentType]
    scores, rows = _scored(given, model, encoder, chosen)
    base: dict[str, float] = {}
    if given.compare == "base":
        with model.disable_adapter():  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
            base, _ = _scored(given, model, encoder, chosen)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / PREDICTIONS).write_text("".join(lines), encoding="utf-8")
    facts = {"model": str(source.base.folder), "adapter": str(source.adapter or ""), "records": len(chosen)}
    summary = plain_numbers({"scores": scores, **({"base": base} if base else {}), **facts})
    (out / "metrics.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, value in scores.items():
        print(f"{name:<18} {value:>8.4f}" + (f"   base {base[name]:.4f}" if name in base else ""))
    print(f"written    {out / PREDICTIONS}, metrics.json")
    return 0


def _check(given: argparse.Namespace) -> None:
    fixed = {"--metric": given.metric != "auto", "--predict_only": given.predict_only}
    fixed |= {"--report_rows": given.report_rows is not None, "--compare FOLDER": given.compare not in (None, "base")}
    if useless := [flag for flag, set_ in fixed.items() if set_]:
        raise UserError(f"{', '.join(useless)} has no effect on full-duplex records; remove it (--compare base works)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("full-duplex records are evaluated by one process; start the command without torchrun")


def _scored(
    given: argparse.Namespace, model: nn.Module, encoder: Encoder, samples: Sequence[Sample]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The scores of a model, and a line of predictions per record."""
    from tqdm.auto import tqdm

    from finetune.evaluation.duplex_decisions import decision_scores, decisions_of
    from finetune.evaluation.duplex_generation import play
    from finetune.evaluation.duplex_scores import as_json, played_scores

    found = tqdm(decisions_of(model, encoder, samples, given.batch_size), desc="decisions", total=len(samples))
    scores = decision_scores([each for row in found for each in row])
    played = []
    with tqdm(desc="playing", total=len(samples), unit="record") as bar:
        for start in range(0, len(samples), given.batch_size):
            batch = samples[start : start + given.batch_size]
            played += play(model, encoder, batch, max_new_tokens=given.max_new_tokens)
            bar.update(len(batch))
    rows = [as_json(index, *each) for index, each in enumerate(zip(samples, played, strict=True))]
    return scores | played_scores(samples, played), rows
