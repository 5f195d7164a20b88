"""``python -m finetune check``: validates every record as training will (structure, image headers, token lengths).

No image is decoded. Takes the flags of training, also in a YAML file in front: flags about data are used, others are
listed and ignored. Prints the counts, the warnings, and all problems by kind. The exit status is that of training: 0
when it would start, 2 when it would refuse the data, 4 when too many records would be skipped. --show and --html show
samples as the model gets them; --write_json converts a file that only Python can read, instead of checking it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.arguments.data import DataArguments
from finetune.arguments.model import ModelArguments
from finetune.commands.parser import CommandParser
from finetune.commands.shared_flags import PROMPT_FLAGS, add_flags, data_arguments
from finetune.utils.errors import ArgumentError, UserError
from finetune.utils.terminal import in_colour

if TYPE_CHECKING:
    from finetune.encoding.encoder import Encoder
    from finetune.encoding.sample_policy import SamplePolicy
    from finetune.pages.record_survey import CheckedDataset
    from finetune.readers.mixture import Mixture

_SHORT = {"model": "model_name_or_path", "data": "data_path"}
"""Short names of training flags, as in other commands."""


def main(argv: list[str]) -> int:
    """Run ``python -m finetune check``; returns the status that training on this data would end with."""
    given = _parsed(argv)
    if given.write_json is not None:
        return _converted(given)
    data, seed = data_arguments(given), given.seed if given.data_seed is None else given.data_seed

    from finetune.data_check.check_records import overlap, require_usable
    from finetune.encoding.sample_policy import SamplePolicy

    encoder = _encoder(given, data)
    try:
        sample_policies = [
            SamplePolicy(samples, encoder, **data.policies) for samples in _opened(data, given.data_path, seed)
        ]
        parts = [_checked(sample_policy, given, data) for sample_policy in sample_policies]
        reports = [part.report for part in parts]
        for line in overlap(sample_policies, reports):
            print(f"warning: {line}")
        if given.html is not None:
            from finetune.pages.data_preview import write_preview

            write_preview(Path(given.html), parts, most=given.samples, seed=seed)
            print(f"written {given.html}")
        require_usable(sample_policies, reports)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _checked(sample_policy: SamplePolicy, given: argparse.Namespace, data: DataArguments) -> CheckedDataset:
    """A data set with its report, which is printed with the table of lengths and the first samples."""
    from finetune.data_check.check_records import check
    from finetune.data_check.decision_counts import check_weighted
    from finetune.data_check.length_table import measure_lengths
    from finetune.pages.record_survey import CheckedDataset, RecordSurvey
    from finetune.pages.terminal_preview import preview_lines

    samples, length_policy, survey = sample_policy.samples, sample_policy.length_policy, RecordSurvey()
    check_weighted(samples, length_policy.encoder.unit_weights)
    report = check(samples, length_policy, data.check or "full", rebuild=data.overwrite_cache, seen=survey.update)
    print(report)
    if (lengths := measure_lengths(samples, length_policy.encoder)) is not None:
        print(lengths)
    for text in preview_lines(samples, length_policy, given.show, colour=in_colour(sys.stdout)):
        print(text)
    return CheckedDataset(samples, length_policy, report, survey, lengths)


def _encoder(given: argparse.Namespace, data: DataArguments) -> Encoder:
    """The encoder that training would use."""
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.encoding.chat_template_check import check_chat_template
    from finetune.encoding.encoder import Encoder
    from finetune.tokenizers.tokenization import load_tokenizer

    wished = {"use_image_id": given.use_image_id, "duplex_prompt": given.duplex_prompt}
    base = resolve_base(given.model_name_or_path, given.downsample_mode, **wished)
    for line in base.choices:
        print(line)
    tokenizer = load_tokenizer(base.folder, duplex_prompt=base.duplex_name)
    options: dict[str, Any] = {"max_length": given.model_max_length, "duplex": base.duplex_name, **data.encoding}
    encoder = Encoder(base.family, tokenizer, base.settings, **options)
    check_chat_template(base.family, tokenizer, encoder.layout, encoder.prompt_tokenizer)
    return encoder


def _opened(data: DataArguments, files: Sequence[str], seed: int) -> Iterator[Mixture]:
    """The data sets: for training, the split of them held out for evaluation, and those for evaluation."""
    from finetune.readers.mixture import open_data

    for path in files or [None]:
        samples = open_data(path, data.dataset, seed=seed, **data.reading)
        yield from samples.split(data.val_size, seed) if data.val_size else (samples,)
    if data.eval_data_path or data.eval_dataset:
        yield open_data(data.eval_data_path, data.eval_dataset, seed=seed, **data.reading)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; a YAML file in front is read, and flags that are not about data must be flags of training.

    Raises:
        ArgumentError: an unknown flag, or no model, or no data.
    """
    parser = build_parser()
    words = [_long(word) for word in argv]
    given, rest = parser.parse_known_args(words)
    if rest:
        given = _with_training(parser, words)
    if given.model_name_or_path is None and given.write_json is None:
        parser.error("--model is missing: the folder of a checkpoint, or its hub id")
    if bool(given.data_path) == bool(given.dataset):
        parser.error("give data, either files by --data or names of dataset_info.json by --dataset")
    return given


def _converted(given: argparse.Namespace) -> int:
    """Writes the data file as JSON instead of checking its records."""
    from finetune.data_files.python_literals import write_json

    if len(given.data_path) != 1:
        raise ArgumentError("--write_json takes exactly one file of --data")
    source, target = Path(given.data_path[0]), Path(given.write_json)
    print(f"{target}: {write_json(source, target)} records of {source} as JSON")
    return 0


def _long(word: str) -> str:
    name, equals, value = word.removeprefix("--").partition("=")
    return f"--{_SHORT[name]}{equals}{value}" if word.startswith("--") and name in _SHORT else word


def _with_training(parser: CommandParser, words: Sequence[str]) -> argparse.Namespace:
    """The command line where it has a YAML file or flags that are not about data."""
    from finetune.arguments.flag_names import takes_many
    from finetune.arguments.resolve import refuse_unknown, resolve

    known = {**takes_many(), "data_path": True}
    resolved = resolve(words, known)
    given, rest = parser.parse_known_args(resolved.argv)
    others = [word for word in rest if word.startswith("--")]
    stray = [resolved.argv[0]] if not resolved.argv[0].startswith("--") else []
    if unknown := stray + [flag for flag in others if flag.removeprefix("--") not in known]:
        refuse_unknown(unknown, [f"--{name}" for name in known])
    typed = {word.partition("=")[0] for word in words}
    if mine := [flag for flag in others if flag in typed]:
        print(f"ignored, not about data: {' '.join(mine)}", file=sys.stderr)
    return given


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune check",
        usage="%(prog)s [FILE.yaml] --model MODEL (--data FILE ... | --dataset NAMES) [flags of training]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("model")
    add_flags(model, ModelArguments, ["model_name_or_path", *PROMPT_FLAGS, "duplex_prompt"])
    data = parser.add_argument_group("data (--model and --data are short for the names that training has)")
    data.add_argument("--data_path", nargs="+", default=[], metavar="FILE", help="data files, each checked by itself")
    names = {entry.name for entry in fields(DataArguments)} - {"data_path"}
    add_flags(data, DataArguments, names)
    data.add_argument("--model_max_length", type=int, default=2048, help="maximum tokens per sample (default: 2048)")
    data.add_argument("--seed", type=int, default=42, help="seed for sampling from data sets (default: 42)")
    data.add_argument("--data_seed", type=int, help="overrides --seed, as in training")
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N samples as the model gets them",
    )
    parser.add_argument("--html", metavar="FILE", help="also write an HTML page of samples as the model gets them")
    parser.add_argument("--samples", type=int, default=50, help="samples on that page (default: 50)")
    parser.add_argument(
        "--write_json",
        metavar="OUT",
        help="only convert the file of --data to JSON: for Python literals with single quotes, as in some guides",
    )
    return parser
