"""Looks at every record of a data file as training will: structure, image headers, lengths; no image is decoded.

Prints the counts, the warnings, and all problems by kind. Exit status 0 when every record can be used, else 2.
"""

from __future__ import annotations

import argparse
import sys

from finetune.commands.data_flags import add_data_flags
from finetune.commands.mode_flag import add_mode_flag
from finetune.commands.parser import CommandParser
from finetune.commands.video_flags import add_video_flags, video_options
from finetune.errors import UserError


def main(argv: list[str]) -> int:
    """Run ``python -m finetune check``; 0 when every record can be used, 2 when one cannot or an argument is wrong."""
    given = _parser().parse_args(argv)

    from finetune.encoding.check import check
    from finetune.encoding.encoder import Encoder
    from finetune.encoding.fitting import Fitter
    from finetune.models import load_tokenizer
    from finetune.readers.mixture import open_data, parse_names
    from finetune.tuning.checkpoint import resolve

    problems, rebuild = 0, given.overwrite_cache == "true"
    try:
        base = resolve(given.model, given.downsample_mode)
        if base.mode is not None:
            print(base.mode)
        encoder = Encoder.from_config(
            base.family,
            load_tokenizer(base.folder),
            base.settings,
            max_slice_nums=given.max_slice_nums,
            max_length=given.model_max_length,
            max_pixels=given.max_image_pixels,
            shrink_pixels=given.image_max_pixels,
            video=video_options(given),
        )
        # Shares decide how often records are taken, not whether they can be used.
        named = [named.name for named in parse_names(given.dataset)] if given.dataset is not None else []
        for path, name in [*((path, None) for path in given.data or ()), *((None, name) for name in named)]:
            samples = open_data(
                path,
                name,
                dataset_dir=given.dataset_dir,
                media_dir=given.media_dir,
                image_root=given.image_root,
                data_format=given.data_format,
                rebuild=rebuild,
                strict_paths=given.strict_paths == "true",
            )
            report = check(samples, Fitter(encoder, given.overlong), given.check, rebuild=rebuild)
            print(report)
            problems += len(report.problems)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2 if problems else 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m finetune check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id: its tokenizer and slicing count")
    add_data_flags(parser, nargs="+", help="data files")
    parser.add_argument("--image_root", help="folder that relative image paths may also be relative to")
    parser.add_argument("--max_slice_nums", type=int, help="most slices per image (default: the checkpoint's)")
    parser.add_argument("--image_max_pixels", type=int, help="as in training: larger images are shrunk to this")
    parser.add_argument("--max_image_pixels", type=int, help="largest image accepted, in pixels")
    parser.add_argument("--model_max_length", type=int, default=2048, help="longest sample in tokens (default: 2048)")
    parser.add_argument("--overlong", choices=["shrink", "drop", "truncate", "error"], default="shrink")
    parser.add_argument("--check", choices=["full", "sample"], default="full", help="sample: 1000 of the records")
    add_mode_flag(parser)
    add_video_flags(parser)
    parser.add_argument(
        "--overwrite_cache",
        choices=["true", "false"],
        default="false",
        help="index the data files anew and look at every record again",
    )
    return parser
