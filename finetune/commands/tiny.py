"""``python -m finetune tiny``: writes a tiny checkpoint with random weights in the official folder layout.

The demo trains it and the tests load it. It takes seconds and no download; before training its answers are noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

from finetune.commands.parser import CommandParser
from finetune.tiny.checkpoint_writer import DTYPES, FAMILIES, write_tiny_checkpoint


def main(argv: list[str]) -> int:
    """Run ``python -m finetune tiny``; 0 on success, 2 when the arguments or the target folder are refused."""
    given = build_parser().parse_args(argv)
    try:
        out = write_tiny_checkpoint(
            given.family,
            given.out,
            seed=given.seed,
            dtype=given.dtype,
            overwrite=given.overwrite,
            experts=given.experts,
        )
    except (FileExistsError, ValueError) as error:
        print(f"tiny: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"tiny {given.family} checkpoint in {out} ({size / 1e6:.1f} MB, random weights, seed {given.seed})")
    return 0


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(prog="python -m finetune tiny", description=__doc__)
    parser.add_argument("--family", required=True, choices=FAMILIES)
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the stored weights")
    parser.add_argument("--overwrite", action="store_true", help="replace a previous result")
    parser.add_argument(
        "--experts", type=int, default=0, help="routed experts of the language model, for v4_7 (default: none, dense)"
    )
    return parser
