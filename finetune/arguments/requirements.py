"""Checks of flags with transformers and the machine: trackers, hub token, FlashAttention, QLoRA with ZeRO-3."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_torch_cuda_available

from finetune.arguments.flag_rules import trackers
from finetune.utils.errors import ArgumentError

if TYPE_CHECKING:
    from finetune.arguments.model import LoraArguments, ModelArguments
    from finetune.arguments.training import TrainingArguments

logger = logging.getLogger(__name__)

ATTENTION = ("sdpa", "eager", "flash_attention_2")
_TOO_NEW = {"swanlab": "0.8"}
"""Versions from which on a package does not work with the callback of transformers."""


def check_training(training: TrainingArguments) -> None:
    """Checks that trackers are usable, and the account for --push_to_hub.

    Raises:
        ArgumentError: with what to install or to give.
    """
    _check_trackers(training)
    _check_hub(training)


def _check_trackers(training: TrainingArguments) -> None:
    """Checks the trackers of --report_to; "all" uses the installed ones.

    Raises:
        ArgumentError: one that transformers cannot use as it is installed, or whose version does not start a run.
    """
    training.report_to = trackers(vars(training))
    names = [name for name in training.report_to if name not in ("", "none", "all")]
    installed = set(get_available_reporting_integrations())
    installed |= {"flyte"} if importlib.util.find_spec("flytekit") else set()
    if missing := [name for name in names if name not in installed]:
        raise ArgumentError(f"--report_to {missing[0]} is installed, but not ready: see its documentation for a key")
    for name, limit in _TOO_NEW.items():
        wanted = name in names or ("all" in training.report_to and name in installed)
        if wanted and Version(version(name)) >= Version(limit):
            raise ArgumentError(
                f"--report_to {name}: {name} {version(name)} does not start a run for transformers; "
                f"pip install '{name}<{limit}'"
            )


def _check_hub(training: TrainingArguments) -> None:
    if not training.push_to_hub:
        return
    from huggingface_hub import get_token

    if training.hub_model_id is None:
        raise ArgumentError("--push_to_hub true needs --hub_model_id OWNER/NAME")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise ArgumentError("--push_to_hub true: HF_HUB_OFFLINE is set, nothing can be uploaded; unset it")
    if training.hub_token is None and get_token() is None:
        raise ArgumentError("--push_to_hub true needs an account: `hf auth login`, or HF_TOKEN in the environment")


def resolve_attention(model: ModelArguments) -> None:
    """Falls back from FlashAttention to SDPA if there is no GPU or no flash-attn.

    Raises:
        ArgumentError: an unknown implementation.
    """
    if model.attn_implementation not in (None, *ATTENTION):
        raise ArgumentError(f"--attn_implementation {model.attn_implementation}: it is {', '.join(ATTENTION)}")
    if model.attn_implementation != "flash_attention_2":
        return
    lacks = "no GPU" if not is_torch_cuda_available() else "no flash-attn (pip install flash-attn)"
    if not is_torch_cuda_available() or importlib.util.find_spec("flash_attn") is None:
        logger.warning("--attn_implementation flash_attention_2: there is %s; sdpa is used instead", lacks)
        model.attn_implementation = "sdpa"


def check_quantised_stage(training: TrainingArguments, what: str = "--q_lora true") -> None:
    """Refuses weights in 4 bit with ZeRO-3; ``what`` says why they are in 4 bit.

    Raises:
        ArgumentError: naming the configuration to use.
    """
    config = training.deepspeed
    stage = config.get("zero_optimization", {}).get("stage", 0) if isinstance(config, dict) else 0
    if stage == 3:
        raise ArgumentError(
            f"{what} with ZeRO-3: quantised weights cannot be partitioned; use ds_config_zero2.json "
            "(DS_CONFIG=ds_config_zero2.json)"
        )


def check_targets(lora: LoraArguments) -> None:
    """Refuses a pattern of module names that is not a valid regular expression.

    Raises:
        ArgumentError: with the error.
    """
    try:
        re.compile(lora.lora_target_modules or "")
    except re.error as error:
        raise ArgumentError(
            f"--lora_target_modules {lora.lora_target_modules!r} is not a regular expression: {error}; give one that "
            "matches full module names, or names separated by commas"
        ) from error
