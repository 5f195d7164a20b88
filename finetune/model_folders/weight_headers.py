"""Refuses truncated safetensors and quantised weights but those of bitsandbytes in 4 bit; reads no tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune.families import detect
from finetune.model_folders.checkpoint_folder import CONFIG, INDEX, WEIGHTS, weight_files
from finetune.model_folders.stored_4bit import quantisation_of, stored_in_4bit
from finetune.utils.errors import CheckpointError
from finetune.utils.json_objects import read_object

# Files of quantisers (GPTQ, AWQ), and suffixes of tensors of quantised layers (those and bitsandbytes).
_QUANTISED_FILES = ("quant_config.json", "quantize_config.json")
_QUANTISED_TENSORS = (".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".nested_absmax", ".SCB")


def check_quantisation(folder: Path) -> None:
    """Checks that the weights of a local folder are not quantised, or in 4 bit by bitsandbytes; no weights pass.

    Raises:
        CheckpointError: they are quantised otherwise; it names the published checkpoint to use instead.
    """
    config = _config_of(folder)
    if stored_in_4bit(config) or (reason := _quantised(folder, config)) is None:
        return
    name = detect(config).hub_id if config else "the unquantised checkpoint"
    raise CheckpointError(
        f"{folder} is quantised ({reason}): such weights can neither be trained nor be merged with an adapter. Use "
        f"{name} instead; --q_lora true loads it in 4 bit"
    )


def _quantised(folder: Path, config: dict[str, Any]) -> str | None:
    """Why the weights of a folder count as quantised; None if they do not."""
    if config.get("quantization_config"):
        method = quantisation_of(config).get("quant_method", "an unnamed method")
        other = ", but not in 4 bit with two values per byte" if method == "bitsandbytes" else ""
        return f"config.json has quantization_config of {method}{other}"
    for name in _QUANTISED_FILES:
        if (folder / name).is_file():
            return f"it has {name}"
    weights = sorted(folder.glob("*.safetensors"))
    if weights and (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        weight_files(folder)  # raises for an interrupted download, before any file is opened
    if not weights and (packed := sorted(path.name for path in folder.glob("*.gguf"))):
        return f"its weights are {packed[0]}"
    for path in weights:
        check_not_truncated(path)
        with safe_open(str(path), framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name.endswith(_QUANTISED_TENSORS) or ".quant_state." in name:
                    return f"{path.name} has {name}"
    return None


def _config_of(folder: Path) -> dict[str, Any]:
    """config.json; empty if it is missing or invalid, which is reported elsewhere."""
    try:
        return read_object(folder / CONFIG)
    except CheckpointError:
        return {}


def check_not_truncated(path: Path) -> None:
    """Checks the header and length of a safetensors file without reading the weights.

    Raises:
        CheckpointError: it is truncated, or not a safetensors file (a Git LFS pointer, an HTML page).
    """
    try:
        with safe_open(str(path), framework="np"):  # "pt" would import torch
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}); copy or download "
            "it again"
        ) from error
