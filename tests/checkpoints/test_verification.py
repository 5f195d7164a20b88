"""Verification of a result: wrong weights are found; tolerance of logits; removal of the reference."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset import make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.verification import (
    LogitComparison,
    Origin,
    compare,
    origin_of,
    take_reference,
    verify_in_fresh_process,
)
from finetune.commands.verify import main
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.training.freezing import adapt
from finetune.utils.number_format import significant
from trainer import CPMTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = ("--tune_resampler", "false", "--learning_rate", "1e-3")
LORA = ("--use_lora", "true", "--lora_r", "4", "--lora_alpha", "8", "--learning_rate", "1e-3")


def trained(folder: Path, data: Path, output: Path, dtype: str, *flags: str) -> Path:
    """Trains two steps, saves, and gives the reference."""
    words = ["--model_name_or_path", str(folder), "--data_path", str(data / "train.json"), "--output_dir", str(output)]
    words += ["--max_steps", "2", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
    words += ["--dataloader_num_workers", "0", "--use_cpu", "true", "--bf16", str(dtype == "bfloat16").lower(), *flags]
    args, base = parse_arguments(words), resolve_base(str(folder))
    encoder = Encoder(base.family, load_tokenizer(folder), base.settings, max_slice_nums=1)
    data_module = make_supervised_data_module(args.data, encoder)
    made = CPMTrainer(
        model=adapt(load_model(folder, dtype=getattr(torch, dtype)), base.family, args.training, args.lora),
        args=args.training,
        base=base,
        part_learning_rates=args.training.part_learning_rates,
        **data_module,
    )
    made.train()
    made.save_model()
    example = data_module["train_dataset"].first_usable()
    reference = take_reference(made, example, encoder.pad_id, dtype, args.lora.q_lora)
    assert reference is not None
    return Path(shutil.move(reference.parent, output / "verify")) / reference.name


@pytest.fixture(scope="module")
def adapter(tiny, demo_data, tmp_path_factory) -> tuple[Path, Path]:
    """An adapter of 4.6 with its merger, trained in bf16, and its reference."""
    output = tmp_path_factory.mktemp("adapter") / "out"
    return output, trained(tiny("v4_6"), demo_data, output, "bfloat16", *LORA)


def test_a_full_run_in_bf16_is_verified_by_what_rounding_does_to_it(tiny, demo_data, tmp_path, capsys):
    reference = trained(tiny("v4_6"), demo_data, tmp_path, "bfloat16", *FULL)
    assert main([str(tmp_path), "--reference", str(reference), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    origin, expected = origin_of(reference), load_file(reference)["logits"]
    # The fresh process has the weights that were rounded here, so that rounding is all that parts the logits.
    assert origin.rounding > 0
    assert f"logit_difference={significant(origin.rounding)} " in said
    tolerance = (origin.rounding + 2 * origin.noise) / expected.abs().max().item()
    assert f"tolerance={significant(tolerance)} " in said
    assert "rounding the trained model to bfloat16 moves these logits by" in said
    assert all(".merger." not in name for name in origin.trained)
    assert f"{len(origin.trained)} of {len(origin.trained)} trained tensors" in said


def test_nothing_is_rounded_in_fp32(tiny, demo_data, tmp_path):
    reference = trained(tiny("v2_6"), demo_data, tmp_path, "float32", *LORA)
    result = compare(load_model(tmp_path).eval(), reference)
    assert (result.difference, result.origin.rounding, result.origin.noise) == (0, 0, 0)
    assert result.tolerance == 1e-4
    assert result.ok


def zeroed(folder: Path, part: str) -> None:
    """Of the tensors with ``part`` in their names the one that has the least to say."""
    weights = load_file(folder / "adapter_model.safetensors")
    name = min((name for name in weights if part in name), key=lambda name: weights[name].norm().item())
    save_file(weights | {name: torch.zeros_like(weights[name])}, folder / "adapter_model.safetensors")


def as_base(folder: Path, base: Path) -> None:
    weights, published = load_file(folder / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    old = {name: published.get(name.removeprefix("base_model.model."), tensor) for name, tensor in weights.items()}
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in old.items())
    save_file(old, folder / "adapter_model.safetensors")


def rescaled(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 9}))


WRONG: dict[str, Any] = {
    "one matrix is zero": lambda folder, _: zeroed(folder, "lora_B"),
    "one bias of the merger is zero": lambda folder, _: zeroed(folder, "linear_2.bias"),
    "the merger is the base's": as_base,
    "another scale": lambda folder, _: rescaled(folder),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_logits_in_bf16_do_not_show_is_found(tiny, adapter, tmp_path, capsys, fault):
    output, reference = adapter
    folder = tmp_path / "out"
    folder.mkdir()
    for path in output.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    flags = [str(folder), "--reference", str(reference), "--device", "cpu"]
    WRONG[fault](folder, tiny("v4_6"))
    assert main(flags) == 3
    said = capsys.readouterr().out
    assert "verified=false" in said
    assert "trained tensors have other values: base_model.model." in said


def test_the_whole_adapter_is_verified(adapter, capsys):
    assert main([str(adapter[0]), "--reference", str(adapter[1]), "--device", "cpu"]) == 0
    assert float(capsys.readouterr().out.split("base_difference=")[1].split()[0]) > 0


def test_logits_count_where_all_that_was_trained_is_right():
    """A base of other weights, or a config.json that computes otherwise."""
    origin = Origin("bfloat16", rounding=0.02, noise=0.01, trained={"a": "1"})
    near = LogitComparison(difference=0.39, largest=10.0, wrong=[], base_difference=None, origin=origin)
    assert near.tolerance == pytest.approx(0.004)
    assert not near.ok
    assert replace(near, difference=0.04).ok
    assert not replace(near, difference=0.04, wrong=["a"]).ok
    assert not replace(near, difference=float("nan")).ok


@pytest.mark.parametrize(("status", "kept"), [(0, False), (3, True)])
def test_the_reference_stays_only_for_another_check(tmp_path, monkeypatch, caplog, status, kept):
    def checked(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert Path(command[-1]).is_file()
        return subprocess.CompletedProcess(command, status)

    reference = tmp_path / "verify-1" / "reference.safetensors"
    reference.parent.mkdir()
    reference.write_bytes(b"logits")
    monkeypatch.setattr(subprocess, "run", checked)
    with caplog.at_level(logging.ERROR):
        assert verify_in_fresh_process(tmp_path / "a result", reference) == status
    assert reference.parent.exists() == kept
    assert (f"finetune verify '{tmp_path}/a result' --reference {reference}" in caplog.text) == kept
