"""Front to back: every record once in a pass, however many readers there are."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from finetune.data_files.streaming import Stream
from finetune.sample import DataError

LINES = [{"id": f"{number}", "text": "x" * (number * 37 % 400)} for number in range(300)]


def write(path: Path, kind: str, records: list[dict]) -> Path:
    """A file, or a folder of three files with an empty one among them."""
    if kind == "folder":
        for place, part in enumerate((records[:7], [], records[7:])):
            write(path / f"{place}.jsonl", "jsonl", part)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=130)
    else:
        text = "".join(json.dumps(record) + "\n" for record in records)
        path.write_text(
            "\ufeff" + text.removesuffix("\n") if kind == "bom" else text.replace("}\n", "}\r\n\n"), "utf-8"
        )
    return path


def place(tmp_path: Path, kind: str, records: list[dict] = LINES) -> Path:
    return write(tmp_path / {"folder": "many", "parquet": "a.parquet"}.get(kind, "a.jsonl"), kind, records)


def ids(stream: Stream, number: int, reader: int, readers: int) -> list[str]:
    return [record.parse()["id"] for record in stream.one_pass(number, reader, readers)]


@pytest.mark.parametrize("kind", ["jsonl", "bom", "folder", "parquet"])
@pytest.mark.parametrize("readers", [1, 2, 7])
def test_a_pass_sees_every_record_once(tmp_path: Path, kind: str, readers: int) -> None:
    stream = Stream([place(tmp_path, kind)], seed=3, buffer_size=20)
    passes = [[ids(stream, number, reader, readers) for reader in range(readers)] for number in range(2)]
    for one in passes:
        assert Counter(sum(one, [])) == Counter(record["id"] for record in LINES)
        # Shares are about equal, so that no reader is passes ahead.
        assert all(0.4 < len(part) * readers / len(LINES) < 1.8 for part in one)
    assert passes[0] != passes[1]
    assert passes[0][0] == ids(Stream(stream.paths, seed=3, buffer_size=20), 0, 0, readers)
    assert passes[0][0] != ids(Stream(stream.paths, seed=4, buffer_size=20), 0, 0, readers)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fewer_records_than_readers(tmp_path: Path, kind: str) -> None:
    stream = Stream([place(tmp_path, kind, LINES[:3])])
    assert sorted(sum((ids(stream, 0, reader, 8) for reader in range(8)), [])) == ["0", "1", "2"]
    # None of them ever runs dry.
    for reader in range(8):
        endless = stream.endless(reader, 8)
        assert {next(endless).parse()["id"] for _ in range(60)} == {"0", "1", "2"}


def test_order_is_mixed(tmp_path: Path) -> None:
    numbers = [int(identity) for identity in ids(Stream([place(tmp_path, "jsonl")], buffer_size=50), 0, 0, 1)]
    neighbours = sum(after == before + 1 for before, after in zip(numbers, numbers[1:], strict=False))
    assert neighbours < 30


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_head_and_sources(tmp_path: Path, kind: str) -> None:
    stream = Stream([place(tmp_path, kind)])
    head = stream.head(limit=200)
    assert [record.parse() for record in head] == LINES[:200]
    again = next(record for record in stream.one_pass(0, 0, 1) if record.parse()["id"] == "150")
    assert again.source() == head[150].source()
    expected = "record 150" if kind == "parquet" else f"byte {head[150].at}"
    assert str(head[150].source()) == f"{stream.paths[0]}, {expected}"
    if kind == "jsonl":
        assert stream.paths[0].read_bytes()[head[150].at :].startswith(b'{"id": "150"')


def test_columns_that_are_none_are_no_keys(tmp_path: Path) -> None:
    records = [{"a": [{"y": 2}], "image": {"bytes": b"\x89", "path": "p"}}, {"a": [{"x": 1}]}]
    assert [record.parse() for record in Stream([place(tmp_path, "parquet", records)]).head()] == records


def test_a_bad_line_is_told_when_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 1,}\n{"a": "\xff"}\n{"a": 2}')
    first, comma, latin, last = Stream([path]).head()
    assert (first.parse(), last.parse()) == ({"a": 1}, {"a": 2})
    with pytest.raises(DataError, match="a.jsonl, line 3: not valid JSON: trailing comma before '}'"):
        comma.parse()
    with pytest.raises(DataError, match="not UTF-8 at byte 27"):
        latin.parse()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            " [{}]",
            r"a JSON array cannot be streamed .* convert it to JSON Lines .*jq -c '.\[\]' a.json > a.jsonl",
        ),
        ("a.csv", "a\n1", "supports JSON Lines, Parquet and WebDataset shards .*; convert it"),
        ("a.parquet", "no", "cannot be read as parquet"),
        ("a.jsonl", "\n\n", "holds no record"),
        ("b.jsonl", None, "no such data file"),
    ],
)
def test_what_cannot_be_streamed(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + message):
        Stream([path]).head()
