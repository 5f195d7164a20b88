"""A folder in 4 bit through the commands: what is trained and merged, and what is refused before anything starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_folders import PUBLISHED, write_packed
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.arguments.model import LoraArguments
from finetune.arguments.parse import parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.run_start import describe_training, find_base
from finetune.checkpoints.saving import finish_adapter
from finetune.commands import evaluate, export, plan, selfcheck
from finetune.early_check import check_early
from finetune.families import by_name
from finetune.model_folders.stored_4bit import packed_weights
from finetune.models import load_model
from finetune.planning.memory_estimate import MemoryEstimator
from finetune.planning.training_setup import TrainingSetup
from finetune.training.lora import add_lora
from finetune.utils.errors import ArgumentError, CheckpointError, UserError

pytest.importorskip("bitsandbytes")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """2.6 in 4 bit, with the vision tower, by the public recipe."""
    return write_packed(tiny("v2_6"), tmp_path_factory.mktemp("int4") / "v2_6-int4", PUBLISHED)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory) -> Path:
    """An adapter on it whose weights are not those of a fresh one."""
    out = tmp_path_factory.mktemp("adapter")
    model = add_lora(load_model(folder, dtype=torch.float32), by_name("v2_6"), ["resampler"], LoraArguments(lora_r=4))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B" in name:
                value.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(str(out))
    finish_adapter(model, out, resolve_base(str(folder)))
    return out


def flags(folder: Path, *more: str) -> list[str]:
    return ["--model_name_or_path", str(folder), "--data_path", "d.json", "--use_cpu", "true", *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), r"cannot be trained in full: --use_lora true .*for full training use openbmb/MiniCPM-V-2_6$"),
        (
            ("--use_lora", "true", "--tune_vision", "true"),
            r"--tune_vision true: .*, 10 weights of its vision part too \(vpm\..*: --tune_vision false, .*llm vision$",
        ),
        (
            ("--use_lora", "true", "--deepspeed", "ds_config_zero3.json"),
            r"is stored in 4 bit with ZeRO-3: .*zero2\.json",
        ),
    ],
    ids=["full", "part", "ZeRO-3"],
)
def test_what_weights_in_4_bit_cannot_do_is_refused(folder, more, message):
    with pytest.raises(ArgumentError, match=message):
        find_base(parse_arguments(flags(folder, *more)))


def test_full_training_is_refused_before_any_process_starts(folder, tmp_path):
    with pytest.raises(ArgumentError, match="stored in 4 bit, and such weights cannot be trained in full"):
        check_early(flags(folder, "--output_dir", str(tmp_path / "out")))


def test_adapters_train_and_q_lora_beside_them_has_no_effect(folder, caplog):
    args = parse_arguments(flags(folder, "--use_lora", "true", "--lora_parts", "llm", "vision", "--q_lora", "true"))
    base = find_base(args)
    assert "--q_lora true has no effect: " in caplog.text
    assert "vision QLoRA r=64, resampler full, llm QLoRA r=64" in describe_training(args, base)


def test_merging_needs_the_unquantised_base_by_name(tiny, folder, adapter, tmp_path, capsys):
    out = ["--adapter_name_or_path", str(adapter), "--export_dir", str(tmp_path / "out")]
    with pytest.raises(
        UserError, match=r"4 bit, into which nothing is merged: .*--model_name_or_path openbmb/MiniCPM-V-2_6"
    ):
        export.main(out)
    with pytest.raises(UserError, match="into which nothing is merged"):
        export.main([*out, "--model_name_or_path", str(folder)])
    assert not (tmp_path / "out").exists()
    assert export.main([*out, "--model_name_or_path", str(tiny("v2_6"))]) == 0
    said = capsys.readouterr().out
    assert f"it was trained on {folder}; family, shapes and ids are compared" in said
    assert "verified=true" in said
    merged, base = (load_file(place / "model.safetensors") for place in (tmp_path / "out", tiny("v2_6")))
    assert merged.keys() == base.keys()
    assert not torch.equal(merged[name := "llm.model.layers.0.self_attn.q_proj.weight"], base[name])


def test_a_named_base_with_other_ids_or_shapes_is_refused(tiny, folder, adapter, tmp_path):
    out = ["--adapter_name_or_path", str(adapter), "--export_dir", str(tmp_path / "out"), "--model_name_or_path"]
    ids = Path(shutil.copytree(tiny("v2_6"), tmp_path / "ids"))
    tokenizer = json.loads((ids / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (ids / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"does not fit .*the token .* has id \d+ there, \d+ beside the adapter"):
        export.main([*out, str(ids)])
    longer = Path(shutil.copytree(tiny("v2_6"), tmp_path / "longer"))
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
    with pytest.raises(CheckpointError, match=r"llm\.model\.layers\.2\..* there, missing in .*int4"):
        export.main([*out, str(longer)])


def test_adapters_are_put_on_by_a_command_of_its_own(folder, adapter, tmp_path):
    """Commands hide bitsandbytes from models that are not in 4 bit."""
    record = {"conversations": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    words = ["--model", str(adapter), "--data", str(tmp_path / "data.json"), "--device", "cpu"]
    words += ["--max_new_tokens", "8", "--out", str(tmp_path / "out"), "--predict_only"]
    subprocess.run([sys.executable, "-m", "finetune", "evaluate", *words], cwd=ROOT, check=True, timeout=300)
    written = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())["prediction"]
    assert evaluate.main([*words, "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "predictions.jsonl").read_text())["prediction"] == written
    assert evaluate.main([*words, "--overwrite", "--model", str(folder)]) == 0
    assert json.loads((tmp_path / "out" / "predictions.jsonl").read_text())["prediction"] != written


def test_selfcheck_counts_every_weight(tiny, folder, capsys):
    assert selfcheck.main([str(folder), "--device", "cpu", "--max_new_tokens", "2"]) == 0
    count = sum(value.numel() for value in load_model(tiny("v2_6")).parameters())
    assert f"{count / 1e6:,.1f} M parameters" in capsys.readouterr().out


def test_plan_counts_the_stored_bytes(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    packed, stored = set(packed_weights([folder / "model.safetensors"])), 0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            weight, _, table = name.partition(".weight.")
            if f"{weight}.weight" not in packed or table in ("", "absmax", "nested_absmax"):  # code tables do not grow
                tensor = file.get_tensor(name)
                # The estimate is of a model in bf16; scales of scales are padded to whole blocks.
                stored += tensor.numel() * (1 if tensor.dtype == torch.uint8 else 2 * (table == ""))
    setup = TrainingSetup(in_4bit=True, tune_resampler=False, lora_r=1)
    estimator = MemoryEstimator(config)
    adapters = estimator._sizes(setup)[1] * 4
    assert estimator.resting(setup).weights - adapters == pytest.approx(stored, rel=0.02)
    assert plan.main([str(folder), "--length", "256", "--slices", "1", "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert "qlora" not in said
    assert "ZeRO-3" not in said
    assert "--use_lora true" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "full"), "is trained with --method lora"),
        (("--tune_vision", "true"), "weights of its vision part"),
    ],
)
def test_plan_refuses_what_training_refuses(folder, capsys, more, message):
    assert plan.main([str(folder), *more]) == 2
    assert message in capsys.readouterr().err
