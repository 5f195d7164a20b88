"""Several data sets as one: shares, repeats, a part for evaluation, and what is said about their records."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from golden_tokenizers import SMALL_IMAGES, tokenizer
from PIL import Image

from dataset import make_supervised_data_module
from finetune.arguments.data import DataArguments
from finetune.data_check.check_records import CheckError, check, check_before_training
from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import LengthPolicy
from finetune.families import by_name
from finetune.readers import read
from finetune.readers.mixture import Mixture, parse_names, read_named
from finetune.sample import DataError

SIZES = {"a": 10, "b": 20, "c": 3}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose data folder has data sets a (sharegpt), b (alpaca) and c (official, with an image)."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (40, 30)).save(data / "x.png")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    records: dict[str, Any] = {
        "a": {"conversations": turns, "system": "s"},
        "b": {"instruction": "i", "output": "o"},
        "c": {"image": "x.png", "conversations": turns},
    }
    for name, record in records.items():
        made = [{"id": f"{name}{number}", **record} for number in range(SIZES[name])]
        (data / f"{name}.json").write_text(json.dumps(made))
    (data / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in SIZES}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(by_name("llama3_v2_5"), tokenizer("llama3"), SMALL_IMAGES)


def ids(samples: Any) -> list[str]:
    return [samples.source(index).id for index in range(len(samples))]


def test_one_after_another(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    samples = read_named("a, b,c")
    assert ids(samples) == [f"{name}{number}" for name, size in SIZES.items() for number in range(size)]
    assert [sample.id for sample in samples] == ids(samples)
    assert samples[-1].source == samples.source(-1) == samples.source(32)
    assert [samples.format_of(index) for index in (0, 10, 30)] == ["sharegpt", "alpaca", "official"]
    assert samples.source(12).file == "data/b.json"
    assert samples.record(12) == {"id": "b2", "instruction": "i", "output": "o"}
    assert [sample.id for sample in samples[9:11]] == ["a9", "b0"]
    with pytest.raises(IndexError):
        samples[33]
    assert "data set b: 20 samples, 60.6 % of 33" in caplog.text


def test_weights(work: Path) -> None:
    share = ids(read_named("a:0.3"))
    assert (len(share), len(set(share)), share) == (3, 3, sorted(share))
    assert ids(read_named("b:1.0,a:0.3"))[20:] == share
    assert ids(read_named("a:0.3", seed=7)) != share
    assert len(read_named("c:0.01")) == 1
    assert ids(read_named("c:2")) == ["c0", "c0", "c1", "c1", "c2", "c2"]
    counts = Counter(ids(read_named("a:2.5")))
    assert sorted(counts.values()) == [2] * 5 + [3] * 5


def test_the_first_of_every_set(work: Path) -> None:
    assert ids(read_named("a,c:2", max_samples=2)) == ["a0", "a1", "c0", "c0", "c1", "c1"]
    assert set(ids(read_named("a:0.5", max_samples=4))) < {"a0", "a1", "a2", "a3"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a,,b", "'a,,b': a name is missing; write names separated by commas"),
        ("a:x", "the weight of 'a' is 'x'; it must be a number above 0"),
        ("a:0", "the weight of 'a' is '0'"),
        ("a:", "the weight of 'a' is ''"),
        ("a,b,a", "'a' is named twice; to take its records twice write a:2"),
    ],
)
def test_bad_names(names: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_names(names)


@pytest.mark.parametrize(("share", "held"), [(0.1, 3), (5, 5), (0.5, 16), (1, 1)])
def test_a_part_for_evaluation(work: Path, share: float, held: int) -> None:
    samples = read_named("a,b:2,c")
    training, evaluation = samples.split(share, 1)
    assert len(evaluation) == held
    assert not set(ids(training)) & set(ids(evaluation))
    assert set(ids(training)) | set(ids(evaluation)) == set(ids(samples))
    assert len(set(ids(evaluation))) == held
    order = {identity: place for place, identity in enumerate(ids(samples))}
    for part in (training, evaluation):
        assert [order[identity] for identity in ids(part)] == sorted(order[identity] for identity in ids(part))
    doubled = Counter(ids(training))
    assert all(doubled[identity] == (2 if identity[0] == "b" else 1) for identity in doubled)
    assert ids(samples.split(share, 1)[1]) == ids(evaluation)


def test_a_file_under_two_names_is_split_as_one(work: Path) -> None:
    info = {name: {"file_name": "a.json"} for name in ("a", "again")}
    (work / "data" / "dataset_info.json").write_text(json.dumps(info))
    training, evaluation = read_named("a,again").split(0.5, 3)
    assert (len(evaluation), len(training)) == (5, 10)
    assert not set(ids(training)) & set(ids(evaluation))


@pytest.mark.parametrize("share", [0.01, 3, 10])
def test_a_part_that_leaves_nothing(work: Path, share: float) -> None:
    with pytest.raises(DataError, match=r"--val_size .* of 3 records gives . for evaluation|gives 10"):
        read_named("c").split(share, 1)


def test_whole_sets_keep_no_list_of_numbers(work: Path) -> None:
    assert read_named("a,b")._order is None
    assert Mixture([read(work / "data" / "a.json")]).first(100)._order is None


def test_flags_to_data(work: Path, encoder: Encoder) -> None:
    flags = DataArguments(dataset="a:0.5,c", eval_dataset="b", max_samples=4)
    made = make_supervised_data_module(flags, encoder)
    assert made["eval_dataset"] is not None
    assert (len(made["train_dataset"].samples), len(made["eval_dataset"])) == (5, 4)
    assert made["train_dataset"][4].source.startswith("data/c.json, record 2")
    kept = make_supervised_data_module(DataArguments(data_path="data/b.json", val_size=0.25), encoder, seed=3)
    assert kept["eval_dataset"] is not None
    assert (len(kept["train_dataset"].samples), len(kept["eval_dataset"])) == (15, 5)
    other = make_supervised_data_module(DataArguments(data_path="data/b.json", val_size=0.25), encoder, seed=4)
    assert ids(kept["train_dataset"].samples) != ids(other["train_dataset"].samples)
    with pytest.raises(DataError, match="record 0.*has no 'messages'"):
        make_supervised_data_module(DataArguments(data_path="data/b.json", data_format="openai"), encoder)[
            "train_dataset"
        ][0]


def test_the_check_names_the_file_of_each_record(
    work: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (work / "data" / "x.png").write_bytes(b"")
    made = make_supervised_data_module(DataArguments(dataset="a,c:2,b"), encoder)
    with pytest.raises(CheckError, match=r"^3 records cannot be used, the first: data/c.json, record 0 \(id 'c0'\)"):
        check_before_training([made["train_dataset"].sample_policy], None)
    assert "check of a, c, b: 33 records" in caplog.text


def test_the_check_remembers_a_mixture_until_a_file_or_its_meaning_changes(work: Path, encoder: Encoder) -> None:
    length_policy = LengthPolicy(encoder, "shrink")

    def reused(names: str, **options: Any) -> int:
        return check(read_named(names, **options), length_policy).reused

    assert [reused("a,c"), reused("a,c"), reused("c,a"), reused("a:0.5,c"), reused("a:0.5,c")] == [0, 13, 0, 0, 8]
    assert reused("a:0.5,c", seed=1) == 0
    assert reused("a,c", media_dir=work) == 0
    (work / "data" / "c.json").write_text((work / "data" / "c.json").read_text() + "\n")
    assert [reused("a,c"), reused("a,c")] == [0, 13]
    columns = {"prompt": "instruction", "response": "output"}
    assert [reused("b"), reused("b")] == [0, 20]
    (work / "data" / "dataset_info.json").write_text(json.dumps({"b": {"file_name": "b.json", "columns": columns}}))
    assert reused("b") == 0


def test_commands_take_names(work: Path, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.commands.check import main as run_check
    from finetune.commands.evaluate import main as evaluate

    base = str(tiny("llama3_v2_5"))
    assert run_check(["--model", base, "--dataset", "a,c:2"]) == 0
    printed = capsys.readouterr().out
    assert "check of a, c: 13 records" in printed, "as training reads them; each record once"
    (work / "data" / "c.json").write_text(json.dumps([{"image": "gone.png", "conversations": []}]))
    assert run_check(["--model", base, "--dataset", "c", "--dataset_dir", "data"]) == 2
    assert run_check(["--model", base, "--dataset", "d"]) == 2
    assert "no data set 'd' is registered" in capsys.readouterr().err
    words = ["--limit", "2", "--max_new_tokens", "1", "--device", "cpu", "--dtype", "float32", "--batch_size", "2"]
    assert evaluate(["--model", base, "--dataset", "b,a", *words]) == 0
    lines = (work / "output" / "evaluate-b-a" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["references"] for line in lines] == [["o"], ["o"]]


@pytest.mark.parametrize("weight", ["1e9", "inf", "nan"])
def test_weights_beyond_any_use(weight: str) -> None:
    with pytest.raises(DataError, match="at most 10000"):
        parse_names(f"a:{weight}")
