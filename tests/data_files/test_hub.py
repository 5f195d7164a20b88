"""Data sets that the datasets library streams: every row once in a pass, the samples that the same rows make by number.

A folder stands for the hub: the library loads both alike, and nothing is fetched.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from made_shards import PNG, TURNS, shard, shown
from packaging.version import Version
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader, IterableDataset

from finetune.data_files.hub import HubStream
from finetune.readers.mixture import open_data
from finetune.readers.streamed_samples import StreamedSamples, open_stream
from finetune.sample import DataError

ROWS = 60


def rows_of(folder: Path, files: int) -> Path:
    """A data set of so many files with an image in each row."""
    image = {"bytes": PNG, "path": "a.png"}
    for number in range(files):
        rows = [{"id": f"{row}", "conversations": TURNS, "image": image} for row in range(number, ROWS, files)]
        folder.mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"train-{number}.parquet")
    return folder


def opened(place: Path, *names: str, **described: Any) -> StreamedSamples:
    entries = {name: {"hf_hub_url": str(place / name), **described} for name in names}
    (place / "dataset_info.json").write_text(json.dumps(entries))
    return open_stream(None, ",".join(names), dataset_dir=place, buffer_size=8)


def ids(stream: Any, number: int, reader: int, readers: int) -> list[str]:
    return [record.parse()["id"] for record in stream.one_pass(number, reader, readers)]


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_a_pass_sees_every_row_once(tmp_path: Path, files: int, readers: int) -> None:
    rows_of(tmp_path / "a", files)
    stream = opened(tmp_path, "a").stream
    passes = [[ids(stream, number, reader, readers) for reader in range(readers)] for number in range(2)]
    for one in passes:
        assert Counter(sum(one, [])) == Counter(str(row) for row in range(ROWS))
    assert passes[0] != passes[1]
    again = opened(tmp_path, "a").stream
    assert again.state == stream.state
    assert [ids(again, 1, reader, readers) for reader in range(readers)] == passes[1]


class Reading(IterableDataset[str]):
    """As training reads: its readers are the loader processes."""

    def __init__(self, stream: HubStream) -> None:
        self.stream = stream

    def __iter__(self) -> Any:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        assert worker is not None
        return iter(ids(self.stream, 0, worker.id, worker.num_workers))


@pytest.mark.parametrize("files", [1, 2])
def test_loader_processes_are_not_dealt_to_twice(tmp_path: Path, files: int) -> None:
    """The library divides its rows among loader processes by itself; they are divided already."""
    rows_of(tmp_path / "a", files)
    stream = opened(tmp_path, "a").stream
    assert isinstance(stream, HubStream)
    seen = Counter(DataLoader(Reading(stream), batch_size=None, num_workers=2))
    assert seen == Counter(str(row) for row in range(ROWS))


def test_samples_are_those_of_the_same_rows_by_number(tmp_path: Path) -> None:
    rows_of(tmp_path / "a", 2)
    streamed = opened(tmp_path, "a")
    expected = {sample.id: shown(sample) for sample in open_data(tmp_path / "a", None)}
    samples = [streamed.sample(record) for record in streamed.stream.one_pass(0, 0, 1)]
    assert {sample.id: shown(sample) for sample in samples} == expected
    assert {sample.id: shown(sample) for sample in streamed.head} == expected
    assert all(isinstance(medium.data, Image.Image) for sample in samples for medium in sample.media())
    # Its file has every other row.
    assert str(streamed.stream.head()[31].source()) == f"{tmp_path / 'a'} train, file 1, row 1"


def test_several_data_sets_are_one_stream(tmp_path: Path) -> None:
    rows_of(tmp_path / "a", 1)
    parquet.write_table(
        pa.Table.from_pylist([{"id": f"b{n}", "conversations": TURNS, "image": PNG} for n in range(10)]),
        rows_of(tmp_path / "b", 1) / "train-0.parquet",
    )
    streamed = opened(tmp_path, "a", "b")
    seen = [ids(streamed.stream, 0, reader, 2) for reader in range(2)]
    assert Counter(sum(seen, [])) == Counter([str(n) for n in range(ROWS)] + [f"b{n}" for n in range(10)])
    assert [name[0] == "b" for name in seen[0]] != sorted(name[0] == "b" for name in seen[0])
    assert {shown(streamed.sample(record)) for record in streamed.stream.one_pass(0, 0, 1)} == {"[8]What?"}


@pytest.mark.skipif(
    Version(datasets.__version__) < Version("5"), reason="datasets 4.4 orders the columns of shards in two ways"
)
def test_shards_through_the_library(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(2):
        files: dict[str, Any] = {}
        for key in range(5):
            files |= {f"{number}{key}.json": {"conversations": TURNS}, f"{number}{key}.png": PNG}
        shard(tmp_path / "a" / f"train-{number}.tar", files)
    streamed = opened(tmp_path, "a")
    samples = [streamed.sample(record) for reader in range(2) for record in streamed.stream.one_pass(0, reader, 2)]
    assert sorted(sample.id for sample in samples) == [f"{number}{key}" for number in range(2) for key in range(5)]
    assert {shown(sample) for sample in samples} == {"[8]What?"}


def test_what_a_stream_of_the_hub_cannot_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of(tmp_path / "a", 1)
    with pytest.raises(DataError, match=r"'split' 'train\[:5\]' is not supported with --streaming true"):
        opened(tmp_path, "a", split="train[:5]")
    entries = {"a": {"hf_hub_url": str(tmp_path / "a")}, "b": {"file_name": "a"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match="data set 'a': data sets of the hub and local files cannot be mixed"):
        open_stream(None, "b,a", dataset_dir=tmp_path)
    with pytest.raises(DataError, match="data set 'c': .* of the Hugging Face hub cannot be loaded"):
        opened(tmp_path, "c")
    stream = opened(tmp_path, "a").stream

    def broken(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets.IterableDataset, "iter", broken)
    with pytest.raises(DataError, match=r"a train, file 0, row 0: cannot be read \(no route\)"):
        next(stream.endless(0, 1))
