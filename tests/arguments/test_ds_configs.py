"""The shipped DeepSpeed configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("zero2", "zero3", "zero2_offload", "zero3_offload")
OFFLOAD = {"device": "cpu", "pin_memory": True}


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"ds_config_{name}.json").read_text(encoding="utf-8"))


def test_there_are_no_others() -> None:
    assert {path.name for path in ROOT.glob("ds_config*.json")} == {f"ds_config_{name}.json" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_and_schedule_stay_the_trainers(name: str) -> None:
    """Either block would silently replace --lr_scheduler_type and the learning rates of the parts."""
    assert not {"optimizer", "scheduler"} & set(load(name))
    assert load(name)["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_precision_come_from_the_flags(name: str) -> None:
    config = load(name)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[size] for size in sizes} == {"auto"}
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert config["fp16"]["loss_scale"] == 0, "0 is dynamic loss scaling"


@pytest.mark.parametrize("name", NAMES)
def test_stage(name: str) -> None:
    zero = load(name)["zero_optimization"]
    assert zero["stage"] == int(name[4])
    # Without it a ZeRO-3 run saves empty tensors.
    assert zero.get("stage3_gather_16bit_weights_on_model_save") is (True if zero["stage"] == 3 else None)


@pytest.mark.parametrize(
    ("plain", "added"), [("zero2", ["offload_optimizer"]), ("zero3", ["offload_optimizer", "offload_param"])]
)
def test_offload_is_the_only_difference(plain: str, added: list[str]) -> None:
    expected = load(plain)
    expected["zero_optimization"].update({key: OFFLOAD for key in added})
    assert load(f"{plain}_offload") == expected


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled in by transformers, then validated by DeepSpeed's own schema."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(load(name)).config
    numbers = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
    }
    config.update(numbers)
    config["bf16"]["enabled"] = config["fp16"]["enabled"] = False
    zero = config["zero_optimization"]
    config["zero_optimization"] = {key: 1000 if value == "auto" else value for key, value in zero.items()}
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_optimization_stage == int(name[4])
    offload = parsed.zero_config.offload_optimizer
    assert (offload is not None) == name.endswith("_offload")
    # An unknown key would be accepted and ignored.
    known = {field.alias or key for key, field in type(parsed.zero_config).model_fields.items()}
    assert set(zero) <= known | set(type(parsed.zero_config).model_fields), set(zero) - known
