"""Records of files of every kind: found once, remembered, read when asked for, by several processes."""

import json
import multiprocessing
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data_files import indexed, json_file, json_scan
from finetune.data_files.records import Chain, open_records, take_split
from finetune.sample import DataError
from finetune.utils import cache

TURNS = [{"role": "user", "content": "<image>\nWas ist das?"}, {"role": "assistant", "content": "图", "loss": 0}]
RECORDS = [
    {"id": "0", "image": "a.jpg", "conversations": TURNS},
    {"id": "1", "conversations": TURNS[:1]},
    {"id": "2", "conversations": TURNS * 2},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index for every file, in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(indexed, "_SMALL", 0)


def write(path: Path, records: Sequence[Any] = RECORDS) -> Path:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_list(list(records)) if path.suffix not in (".json", ".jsonl", ".csv") else None
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".csv":
        cells = [{key: json.dumps(v) if isinstance(v, list) else v for key, v in each.items()} for each in records]
        datasets.Dataset.from_list(cells).to_csv(path)
    elif path.suffix == ".parquet":
        assert rows is not None
        rows.to_parquet(path)
    else:
        assert rows is not None
        rows.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "folder"])
def test_records_come_back_as_written(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert list(open_records(path)) == RECORDS
    records = open_records(path)
    assert list(records) == RECORDS
    with pytest.raises(IndexError):
        records[3]
    copy = pickle.dumps(records)
    assert len(copy) < 3000
    assert list(pickle.loads(copy)) == RECORDS


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv")
    # What a cell means is for the form of the records to say.
    assert open_records(path)[1] == {"id": 1, "conversations": json.dumps(TURNS[:1])}


def test_arrow_file(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(RECORDS[:2])
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert list(open_records(tmp_path / "a.arrow")) == RECORDS[:2]


def test_embedded_images_are_left_as_they_are(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    rows = datasets.Dataset.from_list([{"image": image, "images": [image]}])
    rows = rows.cast_column("image", datasets.Image()).cast_column("images", datasets.List(datasets.Image()))
    rows.to_parquet(tmp_path / "a.parquet")
    assert open_records(tmp_path / "a.parquet")[0] == {"image": image, "images": [image]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_index_is_remembered_until_the_file_changes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / name)
    scans = []
    scan = json_file.scan
    monkeypatch.setattr(json_file, "scan", lambda *given: scans.append(given) or scan(*given))
    assert [len(open_records(path)) for _ in range(3)] == [3] * 3
    assert len(scans) == 1
    assert len(list(cache.folder().iterdir())) == 1
    open_records(path, rebuild=True)
    assert len(scans) == 2
    write(path, RECORDS[:2])
    assert [len(open_records(path)) for _ in range(2)] == [2] * 2
    os.utime(path, ns=(0, 0))
    assert (len(open_records(path)), len(scans)) == (2, 4)
    index = next(cache.folder().iterdir())
    index.write_bytes(index.read_bytes()[:-1])  # cut short
    assert (list(open_records(path)), len(scans)) == (RECORDS[:2], 5)
    assert len(list(cache.folder().iterdir())) == 1


def test_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert list(open_records(write(tmp_path / "a.json"))) == RECORDS
    assert "is not cached" in caplog.text


def test_small_files_need_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_SMALL", 1 << 20)
    records = open_records(write(tmp_path / "a.json"))
    assert list(pickle.loads(pickle.dumps(records))) == RECORDS
    assert not cache.folder().exists()


def test_broken_file_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json")
    path.write_text(path.read_text(encoding="utf-8") + "]", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(DataError, match=r"a.json, line \d+: not valid JSON: Extra data"):
            open_records(path)
    assert list(cache.folder().iterdir()) == []


def test_a_file_that_changes_while_it_is_open(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json")
    records = open_records(path)
    replaced = write(tmp_path / "b.json", [{"other": True}])
    replaced.replace(path)
    assert list(records) == RECORDS  # the file that was opened is still there
    with pytest.raises(DataError, match=r"a.json: the file has changed during the run"):
        pickle.loads(pickle.dumps(records))
    cut = open_records(path)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"a.json, record 0: the file has changed during the run; restart it"):
        cut[0]


def _sum(records: Sequence[Any], seed: int) -> list[str]:
    return [records[index]["id"] for index in random.Random(seed).choices(range(len(records)), k=200)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_several_processes_read_at_once(tmp_path: Path, method: str, name: str) -> None:
    records = open_records(write(tmp_path / name, [{"id": str(n), "text": "x" * n} for n in range(100)]))
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.starmap(_sum, [(records, seed) for seed in range(4)])
    assert found == [_sum(records, seed) for seed in range(4)]


def test_folder_of_files_of_one_kind(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    write(folder / "b.jsonl", RECORDS[1:])
    write(folder / "a.json", RECORDS[:1])
    (folder / "readme.txt").write_text("not data")
    assert list(open_records(folder)) == RECORDS
    write(folder / "c.parquet")
    with pytest.raises(DataError, match=r"many: the folder has data files of several types \(.json, .parquet\)"):
        open_records(folder)
    tables = tmp_path / "tables [1]*"
    write(tables / "a.parquet", RECORDS[:2])
    write(tables / "b.parquet", RECORDS[2:])
    assert [record["id"] for record in open_records(tables)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"no", "a.parquet: cannot be read as parquet: Parquet file size is 2 bytes"),
        ("a.csv", b"id\n", "a.csv: the table has no row"),
        ("a.csv", b"", "a.csv: is empty"),
        ("a.arrow", b"no", "a.arrow: cannot be read as arrow"),
        ("a.csv", b"a,b\n1,2,3,4\n1\n1,2,3,4,5,6\n", "a.csv: cannot be read as csv"),
        ("a.parquet", None, "a.parquet: no such data file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_records(tmp_path / name)


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        ("train", range(60)),
        ("train[:10]", range(10)),
        ("train[10%:20%]", range(6, 12)),
        ("train[-5:]", range(55, 60)),
        ("train[:-5]", range(55)),
        ("train[-50%:]", range(30, 60)),
        ("train[:]", range(60)),
        (" train[ 5 : 5% ] ", None),
        ("train[:70]", None),
        ("train[5]", "not supported"),
        ("test", "not supported"),
        ("train[a:b]", "not supported"),
    ],
)
def test_splits(split: str, chosen: range | str | None) -> None:
    if isinstance(chosen, range):
        assert list(take_split(range(60), split, "here")) == list(chosen)
    else:
        with pytest.raises(DataError, match=f"here: split .*{chosen or 'of 60; give a non-empty range'}"):
            take_split(range(60), split, "here")


def test_chain_is_one_sequence() -> None:
    chain = Chain([range(3), range(3, 4), range(4, 9)])
    assert list(chain) == list(range(9))
    with pytest.raises(IndexError):
        chain[9]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(JSON, min_size=1, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    block=st.integers(3, 40),
    lead=st.sampled_from(["", "\ufeff", " \r\n\t"]),
)
def test_any_array_in_blocks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[Any],
    indent: int | None,
    ascii_only: bool,
    block: int,
    lead: str,
) -> None:
    text = lead + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + " \n"
    file = tmp_path_factory.getbasetemp() / "any.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scan, "_BLOCK", block)
        for content in (
            text,
            lead + "{}\n" + "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values),
        ):
            file.write_bytes(content.encode("utf-8", "surrogatepass" if ascii_only else "replace"))
            expected = json.loads(file.read_text("utf-8-sig")) if content is text else None
            found = list(json_file.JsonRecords(file))
            assert found == expected if expected is not None else len(found) == len(values) + 1
