"""``python -m finetune demo-data``: writes a synthetic image dataset with known answers.

Small images with questions about their colours. Four kinds of record, named in the extra key ``task``: ``single`` (a
square on noise), ``sliced`` (fine dots that the thumbnail averages away, so that only the slices show their colour),
``multi_image`` (one question about two images, answered in their order) and ``multi_turn`` (two turns with an image
each).
"""

from __future__ import annotations

import sys
from pathlib import Path

from finetune.commands.parser import CommandParser
from finetune.tiny.demo_dataset import EVAL, TRAIN, write_demo_dataset


def main(argv: list[str]) -> int:
    """Run ``python -m finetune demo-data``; 0 on success, 2 when the target folder is refused."""
    given = build_parser().parse_args(argv)
    try:
        out = write_demo_dataset(given.out, given.train, given.eval, given.seed, overwrite=given.overwrite)
    except FileExistsError as error:
        print(f"demo-data: {error}", file=sys.stderr)
        return 2
    print(
        f"{given.train} training and {given.eval} held-out records in {out}: train.json, eval.json, eval_blanked.json"
    )
    return 0


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m finetune demo-data", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=TRAIN, help="training records")
    parser.add_argument("--eval", type=int, default=EVAL, help="held-out records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a previous result")
    return parser
