"""Runs our code on recorded official figures: ``python tests/parity.py forward|encode DIR...``.

One line per case; the exit status is 1 when a difference exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("forward", "encode"))
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args(argv)
    if args.what == "forward":
        from parity_forward import check_folder
    else:
        from parity_encode import check_folder
    failures = 0
    for folder in args.folders:
        for result in check_folder(folder):
            print(result)
            failures += not result.ok
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
