"""Compressed files, shards of WebDataset, folders of splits: the records that are in them, by number and streamed."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from made_shards import PNG, TURNS, picture, shard, shown

from finetune.data_files import indexed
from finetune.data_files.records import open_records
from finetune.data_files.streaming import Stream
from finetune.readers import read
from finetune.readers.mixture import open_data
from finetune.sample import DataError
from finetune.utils import cache

ANSWER = {"role": "assistant", "content": "A dog."}
LINES = [
    {"id": f"{number}", "conversations": [{"role": "user", "content": "x" * number}, ANSWER]} for number in range(40)
]


def streamed(*paths: Path, readers: int = 2) -> list[Any]:
    stream = Stream(list(paths), buffer_size=5)
    return [record.parse() for reader in range(readers) for record in stream.one_pass(0, reader, readers)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "A.JSONL.GZ"])
def test_compressed_json(tmp_path: Path, name: str) -> None:
    text = json.dumps(LINES) if name == "a.json.gz" else "\n".join(map(json.dumps, LINES))
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    records = open_records(tmp_path / name)
    assert list(records) == list(pickle.loads(pickle.dumps(records))) == LINES
    if name != "a.json.gz":
        assert sorted(streamed(tmp_path / name), key=lambda record: int(record["id"])) == LINES


def test_a_compressed_file_is_unpacked_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"

    def unpacked() -> set[Path]:
        return set(cache.folder().glob("unpacked-*"))

    before = unpacked()
    for count in (3, 5):
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, LINES[:count])).encode()))
        assert [len(open_records(path)) for _ in range(2)] == [count] * 2
        assert len(unpacked() - before) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(json.dumps(LINES).encode())[:-9], "the compressed file is truncated or damaged"),
        (b"[]", "cannot be decompressed .*is it a .gz file"),
        (gzip.compress(b'[{"a": 1,}]'), "line 1: not valid JSON: trailing comma"),
        (gzip.compress(b"\xff[]"), "not UTF-8 at byte 0; save the file as UTF-8"),
        (gzip.compress(b"<html>"), "is a web page"),
        (None, "no such data file"),
    ],
    ids=["cut", "not compressed", "comma", "not UTF-8", "page", "gone"],  # what is compressed has the time in it
)
def test_bad_compressed_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json.gz").write_bytes(content)
    with pytest.raises(DataError, match=f"a.json.gz.*{message}"):
        open_records(tmp_path / "a.json.gz")


def test_a_bomb_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(LINES).encode()))
    monkeypatch.setattr("finetune.data_files.json_file._KEPT_FREE", 1 << 60)
    with pytest.raises(DataError, match="does not fit into"):
        open_records(tmp_path / "a.json.gz")


OPENAI = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, ANSWER]
NAMED = [{"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}]}, ANSWER]


@pytest.mark.parametrize(
    "files",
    [
        {"0.json": {"conversations": TURNS}, "0.png": PNG},
        {"0.jpg": PNG, "0.json": {"conversations": TURNS}},
        {"a/0.json": {"conversations": TURNS, "image": "somewhere/0.png"}, "a/0.png": PNG},
        {"0.json": {"messages": TURNS, "images": ["a/0.png"]}, "0.png": PNG},
        {"0.json": {"messages": TURNS, "system": "", "images": ["png"]}, "0.png": PNG},
        {"0.json": {"instruction": "<image>What?", "output": "A dog."}, "0.png": PNG},
        {"0.json": {"messages": OPENAI}, "0.png": PNG},
        {"0.json": {"messages": NAMED}, "0.png": PNG},
        {"x" * 150 + ".json": {"conversations": TURNS}, "x" * 150 + ".png": PNG},
    ],
)
@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_records_of_every_form_in_shards(tmp_path: Path, files: dict[str, Any], style: int) -> None:
    if style == tarfile.USTAR_FORMAT:
        files = {name.replace("x" * 100, ""): content for name, content in files.items()}
    (sample,) = read(shard(tmp_path / "a.tar", files, style))
    assert shown(sample) == "[8]What?"
    assert [message.text for message in sample.messages if message.train] == ["A dog."]
    key = next(iter(files)).rpartition(".")[0]
    assert sample.id == key


def test_several_media_and_what_nobody_reads(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image><image>What is that <audio>?"}, ANSWER]
    files = {"k.0.png": PNG, "k.1.png": picture(9), "k.wav": b"RIFF", "k.json": {"id": "own", "conversations": turns}}
    path = shard(tmp_path / "a.tar", {**files, "k.cls": "3"})
    (sample,) = read(path)
    assert (sample.id, shown(sample)) == ("own", "[8][9]What is that [b'RIFF']?")
    assert open_records(path)[0]["cls"] == "3"


def test_captions(tmp_path: Path) -> None:
    """Images with a text alone, as img2dataset writes them, whose JSON describes the download."""
    files = {"0.jpg": PNG, "0.txt": "A dog.", "1.jpg": PNG, "1.txt": "A cat.", "1.json": {"url": "https://a.org"}}
    samples = list(read(shard(tmp_path / "a.tar", files)))
    assert [(shown(sample), shown(sample, 1)) for sample in samples] == [("[8]\n", "A dog."), ("[8]\n", "A cat.")]


def many(folder: Path) -> list[Path]:
    """Three shards of 4 records."""
    shards = []
    for number in range(3):
        files: dict[str, Any] = {}
        for key in range(4):
            files[f"{number}/{key}.json"] = {"conversations": TURNS}
            files[f"{number}/{key}.png"] = picture(10 * number + key + 1)
        shards.append(shard(folder / f"s-{number:03}.tar", files))
    return shards


WIDTHS = [10 * number + key + 1 for number in range(3) for key in range(4)]


@pytest.mark.parametrize("pattern", ["", "s-{000..002}.tar", "s-{000,001,002}.tar", "s-00{0..2}.tar"])
def test_many_shards(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_SMALL", 0)
    shards = many(tmp_path)
    data = open_data(tmp_path / pattern, None)
    assert data.files == shards
    again = pickle.loads(pickle.dumps(data))
    assert [shown(sample) for sample in data] == [shown(sample) for sample in again] == [f"[{w}]What?" for w in WIDTHS]
    (tmp_path / "dataset_info.json").write_text(json.dumps({"s": {"file_name": pattern or "s-{000..002}.tar"}}))
    assert len(open_data(None, "s", dataset_dir=tmp_path)) == 12


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_streamed_shards(tmp_path: Path, readers: int) -> None:
    many(tmp_path)
    wanted = sorted(record["id"] for record in open_records(tmp_path))
    assert sorted(record["id"] for record in streamed(tmp_path, readers=readers)) == wanted


def test_sources_of_streamed_shards(tmp_path: Path) -> None:
    first, _ = Stream([shard(tmp_path / "a.tar", {"0.txt": "x", "1.json": "no"})]).head()
    assert str(first.source()) == f"{tmp_path / 'a.tar'}, byte 0"


def link(path: Path) -> Path:
    with tarfile.open(path, "w") as out:
        entry = tarfile.TarInfo("0.json")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(entry)
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.json": "no"}, "0.json is not JSON"),
        ({"0.json": [1]}, "0.json is not an object; a record has keys"),
        ({"0.json": '{"a": 1, "a": 2}'}, "0.json has the key 'a' twice"),
        ({"0.txt": b"\xff"}, "0.txt is not UTF-8 at byte 0"),
        ({"0.png": PNG}, "has 'png' and no json or txt"),
        ({"0.json": {"conversations": TURNS}, "0.mp4": b"x"}, "a video of 1 bytes inside the record"),
        ({"0.json": {"conversations": TURNS}, "0.png": b"x"}, "an image inside the record"),
    ],
)
def test_bad_records_of_shards(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    good = {"9.json": {"conversations": TURNS}, "9.png": PNG}
    samples = read(shard(tmp_path / "a.tar", {**files, **good}))
    with pytest.raises(DataError, match=f"a.tar, record 0.*{message}"):
        samples[0]
    assert shown(samples[1]) == "[8]What?"


def test_bad_shards(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", {"0.json": {"conversations": TURNS}, "0.png": picture(400)}).read_bytes()
    for content, message in (
        (whole[:1600], "the shard ends within '0.png'"),
        (b"x" * 2048, "cannot be read as a tar file"),
        (bytes(2048), "begins with 512 zero bytes"),
        (b"", r"is empty \(0 bytes\)"),
        (gzip.compress(whole), "compressed by gzip: unpack it"),
    ):
        (tmp_path / "b.tar").write_bytes(content)
        with pytest.raises(DataError, match=f"b.tar: .*{message}"):
            open_records(tmp_path / "b.tar")
    with pytest.raises(DataError, match="'0.json' is a link or a device"):
        open_records(link(tmp_path / "c.tar"))
    apart = shard(tmp_path / "d.tar", {"0.json": {}, "1.json": {}, "0.png": PNG})
    with pytest.raises(DataError, match="members of the key '0' are not consecutive; write the members"):
        open_records(apart)
    with pytest.raises(DataError, match="no member KEY.json or KEY.txt"):
        open_records(shard(tmp_path / "e.tar", {"README": "x"}))
    with pytest.raises(DataError, match=r"\{5\.\.2\} are -2 shards"):
        open_records(tmp_path / "s-{5..2}.tar")
    with pytest.raises(DataError, match="s-001.tar: no such data file"):
        open_records(tmp_path / "s-{001..002}.tar")


def test_a_record_of_a_shard_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data_files.webdataset.MOST_BYTES", 2000)
    with pytest.raises(DataError, match="the members of the key '0' have more than 1 GiB"):
        open_records(shard(tmp_path / "a.tar", {"0.json": {}, "0.png": bytes(4000)}))


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_list(LINES[:6]), "test": Dataset.from_list(LINES[6:10])}
    DatasetDict([*parts.items()]).save_to_disk(tmp_path / "both")
    DatasetDict([("test", parts["test"])]).save_to_disk(tmp_path / "one")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        (None, range(6)),
        ("train", range(6)),
        ("test", range(6, 10)),
        ("test[1:3]", range(7, 9)),
        ("train[50%:]", range(3, 6)),
    ],
)
def test_splits_by_name(splits: Path, split: str | None, ids: range) -> None:
    described = {"s": {"file_name": "both", "formatting": "official"} | ({"split": split} if split else {})}
    (splits / "dataset_info.json").write_text(json.dumps(described))
    assert [sample.id for sample in open_data(None, "s", dataset_dir=splits)] == [str(each) for each in ids]


def test_media_beside_folders_that_the_library_made(tmp_path: Path) -> None:
    """Nobody puts images into them: they are looked for beside the folder, or beside that of all splits."""
    from datasets import Dataset, DatasetDict

    (tmp_path / "a.png").write_bytes(PNG)
    rows = Dataset.from_list([{"image": "a.png", "conversations": TURNS}])
    rows.save_to_disk(tmp_path / "alone")
    DatasetDict([("train", rows)]).save_to_disk(tmp_path / "splits")
    for place in (tmp_path / "alone", tmp_path / "splits" / "train"):
        (medium,) = read(place)[0].media()
        assert medium.data == tmp_path / "a.png"
        with pytest.raises(DataError, match="does not exist"):
            read(place, strict_paths=True)[0]


def test_splits_of_a_path(splits: Path) -> None:
    assert len(read(splits / "one")) == len(read(splits / "both" / "test")) == 4
    with pytest.raises(DataError, match="both: a DatasetDict with the splits test, train; give .*both/train"):
        read(splits / "both")
    (splits / "dataset_info.json").write_text(json.dumps({"s": {"file_name": "both", "split": "dev"}}))
    with pytest.raises(DataError, match="split 'dev' is none of test, train, those of"):
        open_data(None, "s", dataset_dir=splits)
