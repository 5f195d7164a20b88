"""Records that cannot be used, in the data set and through the real trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import make_trainer
from torch.utils.data import DataLoader
from zoo import gradient, write_zoo

from dataset import DataCollator, SupervisedDataset, make_supervised_data_module
from finetune.arguments.data import DataArguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.encoding.encoder import Encoder
from finetune.encoding.sample_policy import (
    BAD_SAMPLES,
    SamplePolicy,
    count_bad_samples,
    describe_bad_samples,
    describe_counts,
)
from finetune.media import image
from finetune.models import load_tokenizer
from finetune.sample import DataError, Media, Sample

BAD = ("truncated.jpg", "empty.png", "page.jpg", "huge.png", "gone.png")
FINE = ("cmyk.jpg", "sixteen.png", "palette.png", "animated.gif")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def record(number: int, zoo: Path, name: str | None) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"What is in picture {number}?"}, {"role": "assistant", "content": "A dog."}]
    return {"id": f"n{number}", "conversations": turns, **({"image": str(zoo / name)} if name else {})}


def write(folder: Path, zoo: Path, names: Sequence[str | None], file: str = "train.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps([record(number, zoo, name) for number, name in enumerate(names)]))
    return folder


def encoder(base: Path, max_length: int = 2048) -> Encoder:
    checkpoint = resolve_base(str(base))
    return Encoder(checkpoint.family, load_tokenizer(base), checkpoint.config, max_length=max_length)


def dataset(folder: Path, made: Encoder, **flags: Any) -> SupervisedDataset:
    data = DataArguments(data_path=str(folder / "train.json"), **flags)
    train = make_supervised_data_module(data, made, folder)["train_dataset"]
    assert isinstance(train, SupervisedDataset)
    return train


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / BAD_SAMPLES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def pixels(zoo: Path, name: str) -> np.ndarray:
    loaded = image.load(Media("image", zoo / name))
    assert loaded.mode == "RGB"
    return np.asarray(loaded).astype(int)


def test_pixels_of_unusual_files(zoo: Path) -> None:
    expected = np.asarray(gradient()).astype(int)
    for name, tolerance in (("good.png", 0), ("cmyk.jpg", 24), ("palette.png", 60)):
        assert np.abs(pixels(zoo, name) - expected).mean() <= tolerance / 4, name
        assert np.abs(pixels(zoo, name) - expected).max() <= tolerance * 2, name
    assert (pixels(zoo, "animated.gif") == (255, 0, 0)).all(), "not the first frame"


def test_16_bit_keeps_its_range(zoo: Path) -> None:
    grey = pixels(zoo, "sixteen.png")
    assert (grey[..., 0] == grey[..., 1]).all()
    flat = grey[..., 0].ravel()
    assert (flat[0], flat[-1]) == (0, 255)
    assert (np.diff(flat) >= 0).all()
    assert abs(flat.mean() - 127.5) < 1


def test_each_unusual_file_is_an_example(tiny: Callable[[str], Path], zoo: Path, tmp_path: Path) -> None:
    made = dataset(write(tmp_path / "d", zoo, FINE), encoder(tiny("llama3_v2_5")))
    for index in range(len(made)):
        assert len(made[index].tgt_sizes) >= 1


def test_error_stops_at_the_record(tiny: Callable[[str], Path], zoo: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", zoo, BAD)
    made = dataset(folder, encoder(tiny("v2_0")))
    for index, name in enumerate(BAD):
        with pytest.raises(DataError, match=rf"train.json, record {index} \(id 'n{index}'\): image .*{name}"):
            made[index]
    assert not lines(folder)


def test_skip_leaves_an_empty_row_and_a_line(tiny: Callable[[str], Path], zoo: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", zoo, [None, *BAD, "good.png"])
    made = dataset(folder, encoder(tiny("v2_0")), on_bad_sample="skip")
    examples = [made[index] for _ in range(2) for index in range(len(made))]
    for example in examples[1:6]:
        assert (example.input_ids.tolist(), example.labels.tolist()) == (
            [made.sample_policy.length_policy.encoder.pad_id],
            [-100],
        )
    batch = DataCollator(0)(examples[:7])
    assert batch["input_ids"].shape[0] == 7
    assert batch["attention_mask"].sum(1).tolist()[1:6] == [1] * 5
    assert (batch["labels"] != -100).any(1).tolist() == [True, *[False] * 5, True]
    assert set(batch["image_bound"][:, 0].tolist()) == {6}
    written = lines(folder)
    assert [(line["record"], line["id"]) for line in written] == [(number, f"n{number}") for number in range(1, 6)]
    for line, name in zip(written, BAD, strict=True):
        assert line["file"] == str(folder / "train.json")
        assert line["exception"] == "DataError"
        assert name in line["message"]
    assert describe_counts(made.sample_policy.counts()) == (
        "14 samples encoded: 4 kept, 0 shrunk, 0 turns removed, 0 truncated, 10 skipped"
    )
    assert describe_counts([0] * 5) is None, "a finished run that is started again"
    assert describe_bad_samples(folder / BAD_SAMPLES) == (
        f"5 records were skipped (5 DataError); {folder / BAD_SAMPLES} lists them"
    )
    assert describe_bad_samples(folder / "none.jsonl") is None


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_too_long_leaves_an_empty_row_whatever_bad_samples_do(
    tiny: Callable[[str], Path], zoo: Path, tmp_path: Path, policy: str
) -> None:
    folder = write(tmp_path / "d", zoo, [None, "good.png"])
    made = dataset(folder, encoder(tiny("v2_0"), max_length=30), on_bad_sample=policy, overlong="drop")
    assert [len(made[index].input_ids) for index in (0, 1)][1] == 1
    assert [(line["record"], line["exception"]) for line in lines(folder)] == [(1, "OverlongError")]
    assert "skipped" in lines(folder)[0]["message"]
    assert (made.first_usable().labels != -100).any()


def test_an_interrupt_and_faults_of_the_program_pass(tiny: Callable[[str], Path]) -> None:
    class Samples(list[Sample]):
        def __init__(self, error: type[BaseException]) -> None:
            super().__init__([])
            self.error = error

        def __getitem__(self, index: Any) -> Any:
            raise self.error

    for error in (KeyboardInterrupt, MemoryError, RuntimeError):
        with pytest.raises(error):
            SamplePolicy(Samples(error), encoder(tiny("v2_0")), on_bad_sample="skip").example(0)


def test_loader_processes_count_and_report(tiny: Callable[[str], Path], zoo: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "d", zoo, [None, "page.jpg"] * 6)
    made = dataset(folder, encoder(tiny("v2_0")), on_bad_sample="skip")
    loader = DataLoader(made, batch_size=1, num_workers=2, collate_fn=DataCollator(0))
    for _ in range(2):
        assert sum(int((batch["labels"] != -100).any()) for batch in loader) == 6
    assert dict(
        zip(("kept", "skipped"), (made.sample_policy.counts()[0], made.sample_policy.counts()[-1]), strict=True)
    ) == {
        "kept": 12,
        "skipped": 12,
    }
    assert {line["record"] for line in lines(folder)} == {1, 3, 5, 7, 9, 11}
    assert str(describe_bad_samples(folder / BAD_SAMPLES)).startswith("6 records")


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5"])
def test_training_equals_training_on_the_good_records(
    tiny: Callable[[str], Path], zoo: Path, tmp_path: Path, family: str
) -> None:
    """One optimizer step per epoch, so that both runs see the same tokens in every step."""
    good: list[str | None] = ["good.png", None, "sixteen.png"]
    mixed: list[str | None] = ["good.png", "truncated.jpg", None, "page.jpg", "gone.png", "sixteen.png"]
    losses = {}
    for kind, names in (("good", good), ("mixed", mixed)):
        folder = write(tmp_path / kind, zoo, names)
        write(folder, zoo, names, "eval.json")
        # The question names its number: the same text for the same picture in both runs.
        for file in ("train.json", "eval.json"):
            text = (folder / file).read_text()
            for number in range(len(names)):
                text = text.replace(f"picture {number}?", "the picture?")
            (folder / file).write_text(text)
        flags = ["--num_train_epochs", "3", "--learning_rate", "1e-3", "--on_bad_sample", "skip"]
        flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"]
        made = make_trainer(tiny(family), folder, folder / "out", *flags)
        made.train()
        losses[kind] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        losses[kind].append(made.evaluate()["eval_loss"])
        assert made.state.global_step == 3
        assert isinstance(made.train_dataset, SupervisedDataset)
        assert made.train_dataset.sample_policy.counts()[-1] == (9 if kind == "mixed" else 0)
    assert losses["mixed"] == pytest.approx(losses["good"], abs=1e-4)
    assert losses["good"][0] > losses["good"][2]


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5"])
def test_steps_of_nothing_but_empty_rows(tiny: Callable[[str], Path], zoo: Path, tmp_path: Path, family: str) -> None:
    """Micro-batches, and whole optimizer steps, without a single label: finite, and nothing is learned from them."""
    folder = write(tmp_path / "d", zoo, ["page.jpg", "page.jpg", "page.jpg", "good.png"])
    write(folder, zoo, ["page.jpg", "page.jpg", "good.png"], "eval.json")
    made = make_trainer(tiny(family), folder, folder / "out", "--num_train_epochs", "2", "--on_bad_sample", "skip")
    made.train()
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(entries) == 8
    assert all(np.isfinite([entry["loss"], entry["grad_norm"]]).all() for entry in entries)
    assert sum(entry["loss"] > 0 for entry in entries) == 2
    assert sum(entry["grad_norm"] > 0 for entry in entries) == 2
    assert isinstance(made.model, torch.nn.Module)
    assert all(torch.isfinite(parameter).all() for parameter in made.model.parameters())
    metrics = made.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    assert metrics["eval_tokens"] == int((made.eval_dataset[2].labels != -100).sum())  # pyright: ignore


def test_the_number_of_bad_samples_is_that_of_distinct_lines(tmp_path):
    path = tmp_path / BAD_SAMPLES
    assert count_bad_samples(path) == 0
    path.write_text("a\nb\na\n")
    assert count_bad_samples(path) == 2
