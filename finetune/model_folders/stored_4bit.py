"""Weights that bitsandbytes stored in 4 bit: their names, how a folder says so, and that they stay frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from finetune.utils.errors import ArgumentError, CheckpointError

# Beside a packed weight lie its tables and one tensor with its shape and type, whose name ends with nf4 or fp4.
_STATE = ".quant_state.bitsandbytes__"
_TABLES = ("absmax", "quant_map")
_NESTED = ("nested_absmax", "nested_quant_map")
_REMEDY = "download the folder again"


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says about quantised weights; empty for whole ones."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def stored_in_4bit(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that bitsandbytes packed the linear layers in 4 bit, two values per byte."""
    said = quantisation_of(config)
    return (
        said.get("quant_method") == "bitsandbytes"
        and bool(said.get("load_in_4bit"))
        and said.get("bnb_4bit_quant_storage", "uint8") == "uint8"
    )


def packed_weights(files: Iterable[Path]) -> list[str]:
    """Names of the weights in 4 bit, by the headers of weight files.

    Raises:
        CheckpointError: a packed weight lacks one of the tensors that it is read with.
    """
    names: set[str] = set()
    for path in files:
        with safe_open(str(path), framework="np") as file:
            names.update(file.keys())
    packed = sorted({name.partition(_STATE)[0] for name in names if _STATE in name})
    for weight in packed:
        nested = _NESTED if any(f"{weight}.{table}" in names for table in _NESTED) else ()
        wanted = (weight, *(f"{weight}.{table}" for table in (*_TABLES, *nested)))
        if missing := next((name for name in wanted if name not in names), None):
            raise CheckpointError(f"{missing} is missing beside {weight}{_STATE}*, a weight in 4 bit: {_REMEDY}")
    return packed


def check_packed(folder: Path, files: Sequence[Path]) -> list[str]:
    """The weights in 4 bit of a folder whose config.json says that it has some.

    Raises:
        CheckpointError: it has none, or one lacks its tables.
    """
    try:
        packed = packed_weights(files)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if not packed:
        raise CheckpointError(
            f"{folder}: quantization_config in config.json says that weights are stored in 4 bit, but the weight files "
            f"have none (no *{_STATE}*): config.json and weights are of different checkpoints; {_REMEDY}"
        )
    return packed


def check_full_parts(
    folder: str | Path, packed: Iterable[str], parts: Mapping[str, Sequence[str]], full: Iterable[str]
) -> None:
    """Refuses to train parts in full that have weights in 4 bit.

    Args:
        folder: the checkpoint, for the message.
        packed: names of its weights in 4 bit.
        parts: modules of its parts (``Family.parts``).
        full: the parts to train in full.

    Raises:
        ArgumentError: naming the part and the flags to use instead.
    """
    packed = list(packed)
    for part in full:
        inside = tuple(f"{module}." for module in parts.get(part, ()))
        if found := [name for name in packed if name.startswith(inside)]:
            raise ArgumentError(
                f"--tune_{part} true: {folder} is stored in 4 bit, {len(found)} weights of its {part} part too "
                f"({found[0]}), which cannot be trained in full: --tune_{part} false, with adapters in it by "
                f"--lora_parts llm {part}"
            )


def check_adapters_only(folder: Path, hub_id: str, *, use_lora: bool) -> None:
    """Refuses full training of a folder in 4 bit; ``hub_id`` is the checkpoint to use for it.

    Raises:
        ArgumentError: without ``use_lora``.
    """
    if not use_lora:
        raise ArgumentError(
            f"{folder} is stored in 4 bit, and such weights cannot be trained in full: --use_lora true "
            f"(finetune_lora.sh) trains adapters on them; for full training use {hub_id}"
        )
