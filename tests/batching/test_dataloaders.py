"""Planned loaders: what each rank gets in each epoch, and how a run goes on after an interruption."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from test_trainer import make_trainer

from trainer import CPMTrainer

FOUR = ("--per_device_train_batch_size", "4")


@pytest.fixture
def make(tiny, demo_data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *flags: make_trainer(tiny("llama3_v2_5"), demo_data, tmp_path / "out", *flags)


def epoch(loader) -> list[list[str]]:
    return [batch["sources"] for batch in loader]


@pytest.mark.parametrize(
    "flags",
    [
        ("--packing", "batch", *FOUR),
        ("--packing", "best_fit", "--model_max_length", "512"),
        ("--train_sampling_strategy", "group_by_length", *FOUR),
        ("--train_sampling_strategy", "batch_rebalance", *FOUR),
    ],
    ids=["batch", "best_fit", "group_by_length", "batch_rebalance"],
)
def test_epochs_have_every_sample_once_in_another_order(make, flags):
    loader = make(*flags).get_train_dataloader()
    first, second = epoch(loader), epoch(loader)
    assert Counter(sum(first, [])) == Counter(sum(second, []))
    assert set(Counter(sum(first, [])).values()) == {1}
    assert len(sum(first, [])) == 32
    assert first != second
    assert epoch(make(*flags).get_train_dataloader()) == first


def test_similar_lengths_are_padded_less(make):
    def padding(*flags: str) -> int:
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in make(*FOUR, *flags).get_train_dataloader())

    assert padding("--train_sampling_strategy", "group_by_length") < padding()


def test_packs_leave_no_padding_and_say_what_they_come_to(make, caplog):
    with caplog.at_level("INFO"):
        loader = make("--packing", "best_fit", "--model_max_length", "512").get_train_dataloader()
    batches = list(loader)
    assert all(batch["cu_seq_lens_q"][-1] == batch["input_ids"].numel() <= 512 for batch in batches)
    line = next(record.getMessage() for record in caplog.records if "packing best_fit" in record.getMessage())
    assert f"{len(batches)} steps per epoch" in line
    assert "32 samples in rows of at most 512 tokens" in line


def watched(trainer: CPMTrainer) -> list[list[str]]:
    """The samples of every micro-batch that a trainer is going to train on."""
    steps: list[list[str]] = []
    begin = trainer.checks.begin

    def note(inputs):
        steps.append(list(inputs["sources"]))
        begin(inputs)

    trainer.checks.begin = note
    return steps


@pytest.mark.parametrize(
    "flags",
    [
        ("--packing", "best_fit", "--model_max_length", "160"),
        ("--train_sampling_strategy", "group_by_length", *FOUR),
        FOUR,
    ],
    ids=["best_fit", "group_by_length", "padded"],
)
def test_a_run_goes_on_in_its_second_epoch(make, tmp_path: Path, flags):
    """Accelerate's wrapper of a resumed epoch does not pass the number of the epoch on."""

    saving = ("--save_strategy", "steps", "--save_steps", "11", "--num_train_epochs", "2", "--use_lora", "true")
    trainer = make(*flags, *saving)
    whole = watched(trainer)
    trainer.train()
    assert len(whole) > 13
    resumed = make(*flags, *saving)
    rest = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-11"))
    assert rest == whole[11:]
