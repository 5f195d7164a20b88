"""Generates the table of served models in docs/export.md: ``python -m tools.serving_doc``."""

from __future__ import annotations

import csv
from pathlib import Path

from finetune.families import by_name

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "export.md", ROOT / "tests" / "serving" / "results.csv"
START, END = "<!-- served: written by python -m tools.serving_doc -->\n", "<!-- served: end -->\n"


def table() -> str:
    """A line for each served model, families in the order of their publication."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["engine"], by_name(row["family"]).title, row["kind"]))
    lines = ["| engine | model | served | in | prompts equal | greedy answers equal | first token |", f"|{'---|' * 7}"]
    lines += [
        f"| {row['engine']} | {by_name(row['family']).title.removeprefix('MiniCPM-')} | {row['kind']} | {row['dtype']} "
        f"| {row['equal']} of {row['prompts']}, by {row['by']} | {row['greedy']} of {row['prompts']} "
        f"| {row['first_token']} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


def written(page: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
