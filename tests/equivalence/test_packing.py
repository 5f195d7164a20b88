"""Packed rows train like padded ones, with every sample once per epoch; on one rank."""

from __future__ import annotations

import importlib.util
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from linear_kernels import put_in_place
from made_records import write_records
from stack import KINDS, LORA, build, flags, unwrapped
from test_in_process import FOUR, assert_equal
from transformers import PreTrainedModel

from finetune import families
from finetune.batching import dataloaders
from finetune.models import load_model
from finetune.utils.errors import ArgumentError, CheckpointError
from trainer import CPMTrainer

# Every family is held in tests/models/test_packed.py or tests/native/test_packed.py, without a trainer.
ROWS = (("v2_0", "full"), ("llama3_v2_5", "lora"), ("o4_5", "full"), ("v4_6", "lora"), ("v4_7", "full"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("packing") / "data")


@pytest.mark.parametrize(("family", "kind"), ROWS)
def test_a_packed_step_is_the_padded_step(tiny, data, tmp_path, monkeypatch, family, kind):
    def make(*more: str) -> CPMTrainer:
        shuffled = ("--train_sampling_strategy", "random")
        return build(flags(tiny(family), data, tmp_path / "out", *KINDS[kind], *FOUR, *shuffled, *more))

    padded, packed = make(), make("--packing", "batch")
    batch = next(iter(packed.get_train_dataloader()))
    assert "attention_mask" not in batch
    assert len(batch["input_ids"]) == 1
    assert len(batch["cu_seq_lens_q"]) == 5
    padded.train()
    put_in_place(monkeypatch)
    packed.train()
    assert_equal(packed, padded, loss=1e-5, norm=2e-5)


@pytest.mark.parametrize("flag", ["batch", "best_fit"])
def test_over_an_epoch_every_sample_has_its_loss_once(tiny, data, tmp_path, flag):
    def losses(*more: str) -> dict[str, list[float]]:
        trainer = build(flags(tiny("llama3_v2_5"), data, tmp_path / "out", *LORA, *more))
        model, found = unwrapped(trainer), {}
        for batch in trainer.get_train_dataloader():
            sources = batch.pop("sources")
            with torch.no_grad():
                rows = model.train()(**batch).row_loss.tolist()
            assert len(rows) == len(sources)
            found |= {source: row for source, row in zip(sources, rows, strict=True) if row[1]}
        return found

    shuffled = ("--train_sampling_strategy", "random", "--per_device_train_batch_size", "4")
    packed, padded = losses("--packing", flag, "--model_max_length", "800", *shuffled), losses()
    assert packed.keys() == padded.keys()
    for source, row in padded.items():
        assert packed[source] == pytest.approx(row, abs=1e-4), source


def test_best_fit_trains_and_steps_have_more_samples(tiny, data, tmp_path):
    made = ("--packing", "best_fit", "--train_sampling_strategy", "random", "--num_train_epochs", "2")
    trainer = build(flags(tiny("v2_6"), data, tmp_path / "out", *LORA, *made, "--model_max_length", "2048"))
    seen = [Counter(source for batch in trainer.get_train_dataloader() for source in batch["sources"])]
    assert set(seen[0].values()) == {1}
    assert len(seen[0]) == 80
    trainer.train()
    assert 2 <= trainer.state.global_step < 80
    assert trainer.state.epoch == 2


@pytest.mark.parametrize("name", ["v4_6", "v4_7"])
def test_linear_attention_is_packed_only_with_its_kernels(tiny, data, tmp_path, monkeypatch, name):
    from finetune.arguments.parse import parse_arguments

    args, family = parse_arguments(flags(tiny(name), data, tmp_path, "--packing", "batch")), families.by_name(name)
    check_packing = partial(dataloaders.check_kernels, from_hub=False)
    installed = ["fla"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object() if module in installed else None)
    with pytest.raises(ArgumentError, match=r"linear attention.*causal-conv1d and a GPU not found.*--packing off"):
        check_packing(args.training, family)
    args.training.use_cpu = False
    with pytest.raises(ArgumentError, match=r"causal-conv1d not found.*pip install -e '\.\[linear\]'"):
        check_packing(args.training, family)
    installed.append("causal_conv1d")
    check_packing(args.training, family)


@pytest.mark.parametrize(
    ("name", "package", "gpu", "message"),
    [
        (
            "v4_6",
            False,
            True,
            r"--use_hub_kernels: a compatible version of the package kernels not found \(pip",
        ),
        ("v4_7", True, False, r"--use_hub_kernels: a GPU not found"),
        ("v4_5", True, True, r"--use_hub_kernels has no effect: MiniCPM-V 4.5 has no linear attention"),
        ("v4_6", True, True, ""),
    ],
)
def test_kernels_of_the_hub(tiny, data, tmp_path, monkeypatch, name, package, gpu, message):
    """They take the place of installed ones; what cannot be is said before anything is loaded."""
    from finetune.arguments.parse import parse_arguments

    more = ("--packing", "batch", "--use_hub_kernels", "true")
    args, family = parse_arguments(flags(tiny(name), data, tmp_path, *more)), families.by_name(name)
    monkeypatch.setattr(dataloaders, "is_kernels_available", lambda: package)
    args.training.use_cpu = not gpu
    with pytest.raises(ArgumentError, match=message) if message else nullcontext():
        dataloaders.check_kernels(args.training, family, from_hub=args.model.use_hub_kernels)


@pytest.mark.parametrize("error", [ImportError("no package"), OSError("no network"), ValueError("no kernel")])
def test_kernels_that_cannot_be_loaded(tiny, monkeypatch, error):
    """The public setting of transformers is what is asked, once the weights are there."""
    asked = []

    def refuse(self, value):
        asked.append(value)
        raise error

    monkeypatch.setattr(PreTrainedModel, "use_kernels", property(lambda self: False, refuse))
    with pytest.raises(CheckpointError, match=rf"could not be loaded \({error}\). Without network access"):
        load_model(tiny("v4_6"), hub_kernels=True)
    assert asked == [True]
    load_model(tiny("v4_6"))
