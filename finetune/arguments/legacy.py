"""Old names: flags that transformers 5 renamed or removed, and other spellings of OpenBMB's LLM_TYPE."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    # A number of steps below 1 is a share of all steps.
    "warmup_ratio": "warmup_steps",
}
# Names of other scripts for the same language models.
LLM_TYPES = {"qwen2": "qwen", "qwen2.5": "qwen", "qwen3": "qwen", "minicpm4": "llama"}
# A boolean flag that became a value of another flag.
_SWITCHES = {"group_by_length": ("train_sampling_strategy", "group_by_length")}
_DROPPED = {
    "save_safetensors": "weights are always saved as safetensors",
    "prediction_loss_only": "evaluation keeps losses, never logits",
    "bf16_full_eval": "evaluation runs in the precision of training",
    "fp16_full_eval": "evaluation runs in the precision of training",
    "logging_dir": "TensorBoard logs go there (TENSORBOARD_LOGGING_DIR)",
    "include_tokens_per_second": "tokens per second are always logged",
    "include_inputs_for_metrics": "there are no metrics over inputs",
    "use_mps_device": "the device is found by itself",
    "half_precision_backend": "autocast is always torch's",
    "fp16_backend": "autocast is always torch's",
    "fp16_opt_level": "apex is not used",
    "past_index": "not supported by this model",
    "jit_mode_eval": "not supported by this model",
    "use_ipex": "not for this model",
    "torchdynamo": "use --torch_compile_backend",
    "ray_scope": "hyperparameter search is not part of this tool",
    "mp_parameters": "not supported by this tool",
    "sharded_ddp": "use --deepspeed",
    "dispatch_batches": "use --accelerator_config",
    "split_batches": "use --accelerator_config",
}


def legacy_names() -> list[str]:
    """All names that ``translate`` knows."""
    return [*_RENAMED, *_SWITCHES, *_DROPPED]


def translate(argv: Sequence[str]) -> list[str]:
    """The command line with current flags; every change is logged as a warning.

    A renamed flag does not override its successor when both are given.
    """
    given = {argument.removeprefix("--").partition("=")[0] for argument in argv if argument.startswith("--")}
    result: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in legacy_names():
            result.append(argument)
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if name in _DROPPED:
            if name == "logging_dir":
                os.environ["TENSORBOARD_LOGGING_DIR"] = value
            # Published launchers set most of these to false, which is the behaviour now.
            if value.lower() not in ("false", "0"):
                logger.warning("--%s %s: has no effect any more; %s", name, value, _DROPPED[name])
            continue
        flag, meant = _SWITCHES.get(name) or (_RENAMED[name], value or "true")
        if name in _SWITCHES and value.lower() in ("false", "0"):
            continue
        if flag in given:
            logger.warning("--%s %s: ignored, --%s is given too", name, value, flag)
        else:
            logger.warning("--%s is now --%s%s", name, flag, f" {meant}" if name in _SWITCHES else "")
            result += [f"--{flag}", meant]
    return result
