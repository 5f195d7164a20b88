"""The DeepSpeed configuration of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from finetune.errors import ArgumentError

logger = logging.getLogger(__name__)

_HERE = Path(__file__).resolve().parents[2]
# LLaMA-Factory's files, which its users name without having them here, and ours that do the same.
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
        config: a path, which may also be that of a file beside finetune.py; the configuration itself; or none.

    Raises:
        ArgumentError: no such file, or no JSON.
    """
    if not isinstance(config, str):
        return config
    if config.lower() == "none":  # takes back what a file says
        return None
    text = config
    if not config.startswith("{"):
        path = _find(config)
        if path is None:
            return None
        text = path.read_text(encoding="utf-8")
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"--deepspeed {config}: not valid JSON ({error})") from error
    for block, flags in (
        ("optimizer", "--learning_rate, --vision_lr, --weight_decay"),
        ("scheduler", "--lr_scheduler_type"),
    ):
        if loaded.pop(block, None) is not None:
            logger.warning("%s: its %r block is ignored, it would override %s", config, block, flags)
            loaded["zero_allow_untested_optimizer"] = True
    return loaded


def _find(config: str) -> Path | None:
    """The file of a configuration; None where it stands for training without ZeRO."""
    for path in (Path(config), _HERE / config):
        if path.is_file():
            return path
    name = Path(config).name
    if name not in _THEIRS:
        raise ArgumentError(f"--deepspeed {config}: no such file in {Path.cwd()} or {_HERE}")
    ours = _THEIRS[name]
    if ours is None:
        logger.warning("--deepspeed %s is not there: training goes without DeepSpeed, as ZeRO-0 would (DDP)", config)
        return None
    logger.warning("--deepspeed %s is not there: %s is used, which does the same", config, ours)
    return _HERE / ours
