"""Data files that are not what their names say, or are damaged: each is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import pytest
from malformed_inputs import FOREIGN, guarded, json_texts, mutated, records

from finetune.data_files.json_file import JsonRecords
from finetune.data_files.records import open_records
from finetune.readers import read
from finetune.readers.streamed_samples import open_stream
from finetune.sample import DataError
from finetune.utils import cache
from finetune.utils.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "arrow"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_file(kind: str, suffix: str, tmp_path: Path) -> None:
    content, words = FOREIGN[kind]
    (tmp_path / f"data.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=rf"data.{suffix}.*({words})"):
        read(tmp_path / f"data.{suffix}")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_damaged_tables(suffix: str, tmp_path: Path) -> None:
    import datasets

    good = [{"instruction": f"Q{number}", "output": "A"} for number in range(20)]
    rows, path = datasets.Dataset.from_list(good), tmp_path / f"data.{suffix}"
    if suffix == "arrow":
        rows.save_to_disk(str(tmp_path / "saved"))
        path.write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    else:
        (rows.to_parquet if suffix == "parquet" else rows.to_csv)(str(path))
    whole, random = path.read_bytes(), Random(suffix)
    assert len(read(path)) == len(good)
    escapes = []
    for number in range(12):
        path = tmp_path / f"damaged{number}.{suffix}"
        path.write_bytes(mutated(whole, random))
        escapes.append(guarded(str(number), lambda path=path: list(read(path)), (UserError,)))
    assert [each for each in escapes if each] == []


def test_damaged_json(tmp_path: Path) -> None:
    """Bytes changed anywhere in an array and in lines, read at random and from front to back."""
    random, escapes = Random(3), []
    good = list(records(tmp_path).values())[:1] * 3
    whole = {"data.json": json.dumps(good).encode(), "data.jsonl": "\n".join(map(json.dumps, good)).encode()}
    for number in range(300):
        name = random.choice(list(whole))
        path = tmp_path / name
        path.write_bytes(mutated(whole[name], random))

        def both(path: Path = path) -> None:
            list(read(path))

        def streamed(path: Path = path) -> None:
            made = open_stream(path, None)
            for record in made.stream.one_pass(0, 0, 1):
                made.sample(record)

        kept = repr(path.read_bytes())[:300]
        escapes.append(guarded(f"{number} {kept}", both, (UserError,)))
        escapes.append(guarded(f"{number} {kept}", streamed, (UserError,)))
    assert [each for each in escapes if each] == []


@pytest.mark.parametrize("name", json_texts())
def test_strange_json_in_a_stream(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json_texts()[name])

    def act() -> None:
        made = open_stream(path, None)
        for record in made.stream.one_pass(0, 0, 1):
            made.sample(record)

    assert guarded(name, act, (UserError,)) is None


def test_the_folder_of_several_splits(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"instruction": "Q", "output": "A"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "dd"))
    with pytest.raises(DataError, match=r"dd: a DatasetDict with the splits test, train; give \S+dd/train$"):
        read(tmp_path / "dd")
    assert len(read(tmp_path / "dd" / "train")) == 1
    (tmp_path / "dd" / "dataset_dict.json").write_text("[")
    with pytest.raises(DataError, match="a DatasetDict with the splits test, train"):
        read(tmp_path / "dd")


def large(path: Path, text: str) -> Path:
    """Lines large enough for an index of their own."""
    path.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number in range(1500)))
    return path


def test_same_size_and_time_is_another_file(tmp_path: Path) -> None:
    path = large(tmp_path / "data.jsonl", "a" * 1000)
    before = path.stat()
    assert len(JsonRecords(path)) == 1500
    longer = [json.dumps({"id": "x", "text": "b" * 100})] * 20
    fill = before.st_size - sum(map(len, longer)) - 20
    (tmp_path / "new").write_text("\n".join(longer) + "\n" + '"' + "c" * (fill - 3) + '"\n')
    os.replace(tmp_path / "new", path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert len(JsonRecords(path)) == 21


def test_an_index_that_does_not_fit_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = large(tmp_path / "data.jsonl", "a" * 1000)
    assert JsonRecords(path)[7]["id"] == "7"
    (index,) = cache.folder().glob("index-*.bin")
    data = bytearray(index.read_bytes())
    data[-16:-8] = (int.from_bytes(data[-16:-8], "little") + 3).to_bytes(8, "little")
    index.write_bytes(data)
    assert JsonRecords(path)[1499]["id"] == "1499"
    assert "was rebuilt" in caplog.text
    caplog.clear()
    assert JsonRecords(path)[1499]["id"] == "1499"
    assert not caplog.text


def test_unfinished_files_of_killed_runs_go_after_a_day(tmp_path: Path) -> None:
    cache.folder().mkdir(parents=True)
    old = ["index-ab12_xyz", "check-0f.1234", "sizes-0f.77.npy", "index-0f.bin.k2.unfinished"]
    kept = ["index-0f.bin", "check-0f.json", "sizes-0f.npy"]
    for name in (*old, *kept):
        (cache.folder() / name).touch()
        os.utime(cache.folder() / name, (1, 1))
    (cache.folder() / "index-1f.bin.k3.unfinished").touch()
    with cache.atomic_write(cache.folder() / "new") as file:
        file.write(b"x")
    assert {path.name for path in cache.folder().iterdir()} == {*kept, "index-1f.bin.k3.unfinished", "new"}


def test_a_folder_that_is_no_data(tmp_path: Path) -> None:
    for given in ("no.json", "a" * 300 + ".json", "a\0.json", "x/" * 3000):
        with pytest.raises(DataError):
            open_records(tmp_path / given)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A pipe would be waited for, a device never ends; the same for the media of a record."""
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(DataError, match="is a pipe, a socket or a device"):
            read(path)
    os.mkfifo(tmp_path / "pipe")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    records = [{kind: "pipe", "conversations": turns} for kind in ("image", "video", "audio")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for number in range(3):
        with pytest.raises(DataError, match=f"record {number}: .* 'pipe' is a pipe, a socket or a device"):
            read(tmp_path / "data.json")[number]
