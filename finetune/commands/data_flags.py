"""The options of commands that read data: a file, or data sets by name."""

from __future__ import annotations

import argparse
from typing import Any


def add_data_flags(parser: argparse.ArgumentParser, **data: Any) -> None:
    """Adds --data or --dataset, one of which is required, and what goes with them; ``data`` is how --data is added."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", **data)
    which.add_argument("--dataset", metavar="NAMES", help="data sets of dataset_info.json, separated by commas")
    parser.add_argument("--dataset_dir", default="data", help="folder of dataset_info.json (default: data)")
    parser.add_argument("--media_dir", help="folder of the media of --dataset (default: dataset_dir)")
    parser.add_argument(
        "--data_format",
        choices=["auto", "official", "sharegpt", "alpaca", "openai"],
        default="auto",
        help="form of the records of --data (default: told from the first ones)",
    )
    parser.add_argument(
        "--strict_paths",
        choices=["true", "false"],
        default="false",
        help="refuse records whose media are outside of the folder of their data file, --image_root and --media_dir",
    )
