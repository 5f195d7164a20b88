"""Loads and checks the DeepSpeed configuration (--deepspeed)."""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path
from typing import Any

from finetune.utils.errors import ArgumentError
from finetune.utils.json_objects import parse, read_text, shown, type_name

logger = logging.getLogger(__name__)

# Top-level keys of a DeepSpeed configuration; a similar name is a typo, with which a run might train without ZeRO.
_KEYS = (
    *("zero_optimization", "bf16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler", "gradient_clipping"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"),
    *("wall_clock_breakdown", "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "aio"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing", "dump_state"),
    *("flops_profiler", "tensorboard", "wandb", "comet", "csv_monitor", "checkpoint", "data_types", "comms_logger"),
    *(
        "elasticity",
        "autotuning",
        "compile",
        "memory_breakdown",
        "sparse_gradients",
        "seq_parallel_communication_data_type",
    ),
)
_HERE = Path(__file__).resolve().parents[2]
# Names of LLaMA-Factory's files, and our equivalents.
_THEIRS = {
    "ds_z0_config.json": None,
    "ds_z2_config.json": "ds_config_zero2.json",
    "ds_z2_offload_config.json": "ds_config_zero2_offload.json",
    "ds_z3_config.json": "ds_config_zero3.json",
    "ds_z3_offload_config.json": "ds_config_zero3_offload.json",
}


def load_deepspeed(config: dict | str | None) -> dict | None:
    """The DeepSpeed configuration as a dictionary (None for none), without the blocks that would override our flags.

    Args:
        config: a path (also relative to the folder of finetune.py), the configuration itself, or none.

    Raises:
        ArgumentError: no such file, or not JSON.
    """
    if not isinstance(config, str):
        return config
    if config.lower() == "none":  # overrides the value of a YAML file
        return None
    text = config
    if not config.startswith("{"):
        path = _find(config)
        if path is None:
            return None
        text = read_text(path, ArgumentError)
    loaded = parse(text, f"--deepspeed {config}", ArgumentError, "correct it, or take one of ds_config_zero*.json")
    _check_shape(loaded, config)
    for block, flags in (
        ("optimizer", "--learning_rate, --vision_lr, --weight_decay"),
        ("scheduler", "--lr_scheduler_type"),
    ):
        if loaded.pop(block, None) is not None:
            logger.warning("%s: its %r block is ignored, it would override %s", config, block, flags)
            loaded["zero_allow_untested_optimizer"] = True
    return loaded


def check_deepspeed(config: dict | str | None, flags: Any) -> None:
    """Refuses values other than "auto" that differ from those of our flags.

    Args:
        config: from ``load_deepspeed``.
        flags: the training flags.

    Raises:
        ArgumentError: naming the key and the flag.
    """
    if not isinstance(config, dict):
        return
    batch, steps = flags.per_device_train_batch_size, flags.gradient_accumulation_steps
    wanted = {
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", batch),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", steps),
        "gradient_clipping": ("max_grad_norm", flags.max_grad_norm),
        "bf16.enabled": ("bf16", flags.bf16),
        "fp16.enabled": ("fp16", flags.fp16),
    }
    for key, (flag, value) in wanted.items():
        block, _, inner = key.partition(".")
        given = config.get(block, "auto")
        if inner:
            given = given.get(inner, "auto") if isinstance(given, dict) else given
        if given not in ("auto", value):
            raise ArgumentError(
                f'--deepspeed: its {key} is {shown(given)}, --{flag} is {shown(value)}; set it to "auto" to use '
                "the flag"
            )
    global_batch = batch * steps * int(os.environ.get("WORLD_SIZE", "1"))
    if config.get("train_batch_size", "auto") not in ("auto", global_batch):
        raise ArgumentError(
            f"--deepspeed: its train_batch_size is {shown(config['train_batch_size'])}, the global batch size of the "
            f'flags is {global_batch} (batch size x accumulation x processes); set it to "auto"'
        )


def _check_shape(loaded: Any, config: str) -> None:
    """Checks that it is an object with known keys and a valid ``zero_optimization``."""
    if not isinstance(loaded, dict):
        raise ArgumentError(f"--deepspeed {config} is {type_name(loaded)}; it should be an object {{...}}")
    for key in loaded:
        near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)
        if key not in _KEYS and near:
            raise ArgumentError(f"--deepspeed {config}: DeepSpeed has no {key} (did you mean {near[0]}?)")
    zero = loaded.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ArgumentError(f"--deepspeed {config}: zero_optimization is {type_name(zero)}; it should be an object")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, (bool, float)):
        raise ArgumentError(
            f"--deepspeed {config}: the stage of zero_optimization is {shown(stage)}; it is 0, 1, 2 or 3"
        )


def check_config_file(config: str) -> None:
    """Checks that there is a file for the value of --deepspeed, without reading it.

    Raises:
        ArgumentError: there is none.
    """
    if config.lower() != "none" and not config.startswith("{") and Path(config).name not in _THEIRS:
        _find(config)


def _find(config: str) -> Path | None:
    """The file of a configuration; None for LLaMA-Factory's ZeRO-0."""
    for path in (Path(config), _HERE / config):
        if path.is_file():
            return path
    name = Path(config).name
    if name not in _THEIRS:
        folders = " or ".join(dict.fromkeys((str(Path.cwd()), str(_HERE))))
        ours = ", ".join(sorted(path.name for path in _HERE.glob("ds_config_*.json")))
        raise ArgumentError(f"--deepspeed {config}: no such file in {folders}; there are {ours}")
    ours = _THEIRS[name]
    if ours is None:
        logger.warning("--deepspeed %s does not exist: training without DeepSpeed (DDP), equivalent to ZeRO-0", config)
        return None
    logger.warning("--deepspeed %s does not exist: the equivalent %s is used", config, ours)
    return _HERE / ours


def check_zero(config: Any) -> None:
    """Checks the block ``zero_optimization`` with DeepSpeed's own schema; call after the device is chosen.

    Args:
        config: from ``load_deepspeed``.

    Raises:
        ArgumentError: a key that DeepSpeed does not have, or a value of another type.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ArgumentError(f"--deepspeed: zero_optimization, {key} {first['input']!r}: {first['msg']}") from error
