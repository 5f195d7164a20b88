"""results.csv: one row for each model that was served and compared; docs/export.md has its table from it."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("results.csv")


@dataclass(frozen=True, slots=True)
class Cell:
    """What is served: a family, by an engine, as "full", "merged" or "adapter", or a special case of these."""

    family: str
    engine: str
    kind: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row: number of prompts, how many were equal and by what, equal greedy answers, first-token difference."""

    family: str
    engine: str
    kind: str
    dtype: str
    prompts: int
    equal: int
    by: str
    greedy: int
    first_token: str
    date: str

    @property
    def cell(self) -> Cell:
        """What was served."""
        return Cell(self.family, self.engine, self.kind)


def row_of(cell: Cell, dtype: str, compared: Sequence[Mapping[str, Any]]) -> Row:
    """The row of the lines of a comparison.jsonl."""
    told = all(line["ids_told"] for line in compared)
    equal = sum(line["prompt_equal"] is True for line in compared)
    greedy = sum(line["answers_equal"] for line in compared)
    first = max(line["first_token"] for line in compared)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Row(
        **asdict(cell),
        dtype=dtype,
        prompts=len(compared),
        equal=equal,
        by="ids" if told else "lengths",
        greedy=greedy,
        first_token=f"{first:.1e}",
        date=today,
    )


def read() -> list[Row]:
    """All rows."""
    if not FILE.is_file():
        return []
    with FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = ("prompts", "equal", "greedy")
    return [Row(**{**row, **{name: int(row[name]) for name in numbers}}) for row in rows]  # pyright: ignore[reportArgumentType]


def write(row: Row) -> None:
    """Adds a row in the place of an older one of the same cell."""
    rows = sorted(
        [*(each for each in read() if each.cell != row.cell), row],
        key=lambda each: (each.family, each.engine, each.kind),
    )
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in rows)
