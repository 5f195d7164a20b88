"""Adapters that change nothing are found by verify, export and training, whatever the sample uses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_adapters import make_adapter, save
from peft import LoraConfig, PeftModel, get_peft_model

from finetune.checkpoints.adapter_effect import no_effect
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.saving import finish_adapter
from finetune.commands import export, verify
from finetune.families import by_name
from finetune.models import load_model
from finetune.utils.terminal import red

pytestmark = pytest.mark.usefixtures("one_thread", "recwarn")

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "v2_6"
LLM, VISION = (by_name(FAMILY).lora_targets[part] for part in ("llm", "vision"))


def adapted(base: Path, target: str, **options: Any) -> PeftModel:
    """An adapter as it is before the first step: B is zero."""
    network: Any = load_model(base)
    model = get_peft_model(network, LoraConfig(r=2, target_modules=target, **options))
    assert isinstance(model, PeftModel)
    return model.eval()


def saved(model: PeftModel, base: Path, folder: Path) -> Path:
    save(model, folder)
    finish_adapter(model, folder, resolve_base(str(base)))
    return folder


def set_one(model: PeftModel, part: str, value: float) -> None:
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if part in name).view(-1)[0] = value


@pytest.fixture
def idle(tiny, tmp_path) -> Path:
    model = adapted(tiny(FAMILY), LLM, modules_to_save=["resampler"])
    return saved(model, tiny(FAMILY), tmp_path / "idle")


def test_verify_says_that_an_adapter_changes_nothing(idle, capsys):
    assert verify.main([str(idle), "--device", "cpu"]) == 4
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"error: {idle} loads, but the adapter changes nothing: its weights are zero")


def test_verify_ends_with_a_verdict(tiny, tmp_path, capsys):
    folder = saved(make_adapter(tiny(FAMILY), FAMILY, target_modules=LLM), tiny(FAMILY), tmp_path / "good")
    assert verify.main([str(folder), "--device", "cpu"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"verdict: {folder} loads; the adapter changes the base; it was not compared with its training, which "
        "--reference does"
    )
    assert verify.main([str(tiny(FAMILY)), "--device", "cpu"]) == 0
    assert "adapter" not in capsys.readouterr().out.splitlines()[-1]


def test_export_says_that_an_adapter_changes_nothing(idle, tmp_path, capsys):
    flags = ["--adapter_name_or_path", str(idle), "--export_dir", str(tmp_path / "out")]
    assert export.main(flags) == 4
    said = capsys.readouterr().out
    assert "base_difference=0" in said
    assert said.splitlines()[-1].startswith("error: the adapter changes nothing: its weights are zero")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("part", ["lora_B", "modules_to_save"])
def test_one_value_is_a_change(tiny, part):
    model = adapted(tiny(FAMILY), LLM, modules_to_save=["resampler"])
    assert no_effect(model, None) == no_effect(model, 0.0) == "its weights are zero or those of the base"
    set_one(model, part, 0.5)
    assert no_effect(model, 0.1) is None
    assert no_effect(model, None) is None


def test_what_rounding_removes_is_no_change_unless_the_sample_does_not_use_it(tiny):
    model = adapted(tiny(FAMILY), LLM)
    set_one(model, "lora_B", 1e-30)
    assert "not one logit differs" in str(no_effect(model, 0.0))
    model = adapted(tiny(FAMILY), VISION)
    set_one(model, "lora_B", 0.5)
    assert no_effect(model, 0.0) is None, "a sample without image shows nothing of a vision tower"
    assert no_effect(load_model(tiny(FAMILY)), None) is None


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_red_only_on_a_terminal_that_wants_it(monkeypatch, idle):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert red("x", io.StringIO()) == "x"
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert verify.main([str(idle), "--device", "cpu"]) == 4
    assert screen.getvalue().splitlines()[-1].startswith("\x1b[31merror: ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert red("x", screen) == "x"


def test_a_run_whose_adapter_changes_nothing_is_an_error(tiny, demo_data, tmp_path, forked_python):
    """The learning rate of the only step is that of the start of the warmup: zero."""
    words = [
        "--model_name_or_path",
        str(tiny(FAMILY)),
        "--data_path",
        str(demo_data / "train.json"),
        "--max_steps",
        "1",
    ]
    words += ["--warmup_steps", "1", "--use_lora", "true", "--tune_resampler", "false", "--use_cpu", "true"]
    words += ["--report_to", "none", "--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", "0"]
    words += ["--model_max_length", "1024", "--save_strategy", "no"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [forked_python, str(ROOT / "finetune.py"), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    *_, verdict, last = done.stdout.splitlines()
    assert done.returncode == 4, done.stderr
    assert verdict.startswith("error: ")
    assert "but the adapter changes nothing: its weights are zero" in verdict
    result = json.loads(last.removeprefix("result="))
    assert (result["status"], result["exit_code"], result["verified"]) == ("error", 4, True)
    assert result["message"] == "the adapter changes nothing"
