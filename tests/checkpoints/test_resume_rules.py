"""Comparison of a resumed run with its checkpoint: every flag has a rule; base and data are identified."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
from made_checkpoints import checkpoint, training

from dataset import data_files
from finetune.arguments.parse import GROUPS, parse_arguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.manifest import Manifest
from finetune.checkpoints.resume import ResumeError, choose_checkpoint
from finetune.checkpoints.resume_rules import RULES, Decision, compare
from finetune.checkpoints.run_identity import RunIdentity, identify


def test_every_flag_has_one_rule():
    """A flag that is added must be thought about: what if a resumed run has it otherwise?"""
    counts = Counter(name for rule in RULES for name in rule.flags.split())
    assert [name for name, count in counts.items() if count > 1] == []
    flags = {entry.name for group in GROUPS for entry in fields(group)}
    assert sorted(flags - set(counts)) == []
    assert all(rule.why for rule in RULES if rule.decision is Decision.REFUSED)


def made(base: Path, data: Path, output: Path, *flags: str) -> RunIdentity:
    words = ["--model_name_or_path", str(base), "--data_path", str(data), "--output_dir", str(output)]
    args = parse_arguments([*words, "--use_lora", "true", "--report_to", "none", *flags])
    return identify(args, resolve_base(str(base)), data_files(args.data))


def manifest_of(identity: RunIdentity) -> Manifest:
    plain = json.loads(json.dumps(identity.manifest_fields()))
    layout = {"zero_stage": 0, "method": "lora", "batch_size": 1, "accumulation": 1, "resumable": True, "files": {}}
    return Manifest(step=1, world_size=1, written=0.0, **layout, **plain)


@pytest.fixture(scope="module")
def first(tiny, demo_data, tmp_path_factory) -> RunIdentity:
    return made(tiny("llama3_v2_5"), demo_data / "train.json", tmp_path_factory.mktemp("run"))


def test_the_same_goes_on(first, tiny, demo_data, tmp_path):
    found = compare(manifest_of(first), made(tiny("llama3_v2_5"), demo_data / "train.json", tmp_path))
    assert found.refused == []
    assert [words.partition(" ")[0] for words in found.accepted] == ["output_dir"]
    assert not found.affects_training
    assert "data train.json" in str(found)


REFUSED = {
    "--learning_rate 5e-3": r"--learning_rate was 0\.0001, now 0\.005.*no effect",
    "--lora_r 8": "--lora_r was 64, now 8: .* belong to other parameters",
    "--lora_parts llm vision": r"--lora_parts was \['llm'\], now \['llm', 'vision'\]",
    "--tune_resampler false": "--tune_resampler was True, now False",
    "--tune_vision true": "--tune_vision was False, now True",
    "--optim sgd": "--optim was adamw_torch_fused, now sgd: .* of another optimizer",
    "--lr_scheduler_type cosine": "--lr_scheduler_type was linear, now cosine: .* jump",
    "--lora_alpha 8": "another scale",
}
TAKEN = {
    "--seed 7": "seed 42 -> 7 (samples are not seen exactly once)",
    "--max_slice_nums 2": "max_slice_nums None -> 2 (samples are encoded differently from here on)",
    "--model_max_length 1024": "model_max_length 2048 -> 1024 (samples are encoded differently",
    "--max_steps 20": "max_steps -1 -> 20 (the schedule is computed for the new length",
    "--save_steps 7 --save_strategy steps": "save_steps 500 -> 7",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_is_refused(first, tiny, demo_data, tmp_path, flags):
    base, data = tiny("llama3_v2_5"), demo_data / "train.json"
    folder = checkpoint(tmp_path, 2, **{**first.manifest_fields(), "run": "r"})
    with pytest.raises(ResumeError, match=rf"{REFUSED[flags]}.*start a new run from its weights: --lora_weight_path"):
        choose_checkpoint(training(tmp_path, str(folder)), tmp_path, made(base, data, tmp_path, *flags.split()))


@pytest.mark.parametrize("flags", TAKEN)
def test_what_is_taken_over(first, tiny, demo_data, tmp_path, flags):
    now = made(tiny("llama3_v2_5"), demo_data / "train.json", tmp_path, *flags.split())
    found = compare(manifest_of(first), now)
    assert found.refused == []
    assert TAKEN[flags] in str(found)
    assert found.affects_training == ("(" in TAKEN[flags])


def test_another_base(first, tiny, tmp_path, demo_data):
    """Of the same shapes with other weights, and of another generation."""
    other = tmp_path / "other"
    other.mkdir()
    base = tiny("llama3_v2_5")
    for path in base.iterdir():
        content = path.read_bytes()
        (other / path.name).write_bytes(content[:-4] + b"\0\0\0\1" if path.suffix == ".safetensors" else content)
    data = demo_data / "train.json"
    found = compare(manifest_of(first), made(other, data, tmp_path))
    assert len(found.refused) == 1
    assert f"the base was {base}, now {other}: the trained weights belong to the previous base" in found.refused[0]
    (base_again := tmp_path / "moved").symlink_to(base)
    assert compare(manifest_of(first), made(base_again, data, tmp_path)).refused == []
    found = compare(manifest_of(first), made(tiny("v2_6"), data, tmp_path))
    assert "another model family" in found.refused[0]


def test_other_data_are_said(first, tiny, demo_data, tmp_path, caplog):
    records = json.loads((demo_data / "train.json").read_text())
    base = tiny("llama3_v2_5")
    (tmp_path / "other.json").write_text(json.dumps(records[:50]))
    found = compare(manifest_of(first), made(base, tmp_path / "other.json", tmp_path))
    assert "data train.json -> other.json (samples are not seen exactly once)" in found.accepted
    (tmp_path / "train.json").write_text(json.dumps(records[::-1]))
    folder = checkpoint(tmp_path, 2, **{**first.manifest_fields(), "run": "r"})
    caplog.set_level(logging.WARNING)
    now = made(base, tmp_path / "train.json", tmp_path)
    assert choose_checkpoint(training(tmp_path, str(folder)), tmp_path, now) == folder
    assert "differs, accepted: data changed: train.json (samples are not seen exactly once)" in caplog.text
