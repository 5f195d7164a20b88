"""Streamed records become the samples that the same records by number become."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.readers import read
from finetune.readers.streamed_samples import StreamedSamples, open_stream
from finetune.sample import DataError, Media, Text

TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dog."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two data sets, one with its images inside, and their descriptions."""
    import pyarrow as pa
    from pyarrow import parquet

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    lines = [{"id": f"line {n}", "image": "a.png", "conversations": TURNS} for n in range(30)]
    rows = [{"talk": TURNS, "pictures": [image]} for _ in range(10)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    described: dict[str, dict[str, Any]] = {
        "lines": {"file_name": "lines.jsonl"},
        "rows": {
            "file_name": "rows.parquet",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "images": "pictures"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "part": {"file_name": "lines.jsonl", "split": "train[:5]"},
        "some": {"file_name": "lines.jsonl", "num_samples": 5},
        "hub": {"hf_hub_url": "somebody/something"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    return tmp_path


def one_pass(streamed: StreamedSamples) -> list[Any]:
    return [streamed.sample(record) for reader in range(2) for record in streamed.stream.one_pass(0, reader, 2)]


def test_a_file(folder: Path) -> None:
    streamed = open_stream(folder / "lines.jsonl", None)
    expected = {sample.id: sample.messages for sample in read(folder / "lines.jsonl")}
    assert {sample.id: sample.messages for sample in one_pass(streamed)} == expected
    assert {sample.id: sample.messages for sample in streamed.head} == expected
    sample = next(sample for sample in one_pass(streamed) if sample.id == "line 3")
    assert str(sample.source).endswith(" (id 'line 3')")
    assert ", byte " in str(sample.source)


def test_data_sets_are_one_stream(folder: Path) -> None:
    streamed = open_stream(None, "lines, rows", dataset_dir=folder)
    samples = one_pass(streamed)
    assert len(samples) == len(streamed.head) == 40
    embedded = [sample for sample in samples if sample.source.file.endswith("rows.parquet")]
    assert sorted(sample.source.index for sample in embedded) == list(range(10))
    media, text = embedded[0].messages[0].parts
    assert isinstance(media, Media)
    assert text == Text("What?")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("lines:0.5", "data set 'lines': the weight 0.5 is not supported with --streaming true"),
        ("part", "'split' 'train"),
        ("some", "'num_samples' is not supported"),
        ("rows,hub", "data sets of the hub and local files"),
        ("line", "did you mean 'lines'"),
    ],
)
def test_what_a_stream_cannot_give(folder: Path, names: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_stream(None, names, dataset_dir=folder)


def test_a_bad_line_in_the_head(folder: Path) -> None:
    path = folder / "lines.jsonl"
    path.write_text(path.read_text().replace("A dog.", "A dog.'}", 1).replace('"}', "'}", 1))
    streamed = open_stream(path, None)
    with pytest.raises(DataError, match="lines.jsonl, line 1: not valid JSON"):
        streamed.head[0]
