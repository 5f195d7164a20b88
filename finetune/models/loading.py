"""Loads models from checkpoint folders, adapter folders or hub ids, with all checks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from finetune.families import detect
from finetune.families.common import vocab_size
from finetune.families.settings import DOWNSAMPLE_MODE
from finetune.model_folders.checkpoint_folder import ADAPTER_CONFIG, is_adapter, read_adapter_config, resolve_folder
from finetune.model_folders.downsample_mode import decide, saved_with
from finetune.models.adapters import put_adapter
from finetune.models.configuration import MiniCPMOConfig, MiniCPMVConfig
from finetune.models.minicpmo import MiniCPMO
from finetune.models.minicpmv import MiniCPMV
from finetune.models.minicpmv4_6 import NATIVE_MODELS
from finetune.models.strict_loading import check_folder
from finetune.tokenizers.tokenization import check_tokens, load_tokenizer
from finetune.utils.errors import CheckpointError
from finetune.utils.log_once import warn_once
from finetune.utils.paths import expand

logger = logging.getLogger(__name__)

# By the model_type of config.json.
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    MiniCPMVConfig.model_type: MiniCPMV,
    MiniCPMOConfig.model_type: MiniCPMO,
    **NATIVE_MODELS,
}


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
    adapter_name: str = "default",
    tokenizer_required: bool = True,
    downsample_mode: str | None = None,
    hub_kernels: bool = False,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Loads a full checkpoint, or an adapter on top of the base checkpoint that it names.

    Adapters of the first published scripts are loaded with their vpm_resampler_embedtokens.pt.

    Every parameter of the loaded model requires gradients; freezing has to follow loading.

    Args:
        model: local folder, or a hub id (the only case that may use the network).
        dtype: of the weights; "auto" uses that of the files.
        device_map: as in transformers ("auto", {"": 0}, ...).
        attn_implementation: "sdpa", "eager" or "flash_attention_2"; None lets transformers choose.
        revision: of the hub id.
        base: folder of the base checkpoint of an adapter; None for the one that the adapter names.
        adapter_name: name of the adapter, for ``set_adapter`` with several adapters (``load_adapter``).
        tokenizer_required: also check that the tokenizer in the folder has the tokens that the family needs.
        downsample_mode: "16x" or "4x", for families that have it; None for that of the environment, the adapter or the
            checkpoint (``model_folders.downsample_mode.decide``).
        hub_kernels: use the kernels of transformers' hub mapping; downloads and runs code.
        **kwargs: passed to ``from_pretrained`` (offload_folder, quantization_config, ...).

    Raises:
        CheckpointError: no such folder, files are missing, weights, config.json and tokenizer disagree, or kernels
            could not be downloaded.
        ArgumentError: a downsample_mode that is unknown, or that the family does not have.
        UnknownFamilyError: a config.json of none of the supported generations.
    """
    folder = resolve_folder(str(model), revision)
    options = {"dtype": dtype, "device_map": device_map, **kwargs}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    below, adapter = _base_and_adapter(folder, base)
    loaded = _load_full(below, tokenizer_required, downsample_mode, adapter, options)
    if hub_kernels:
        _use_hub_kernels(loaded)
    return loaded if adapter is None else put_adapter(loaded, adapter, adapter_name)


def _base_and_adapter(folder: Path, base: str | Path | None) -> tuple[Path, Path | None]:
    """The base checkpoint of a folder, the folder itself unless it is an adapter; and the adapter.

    Raises:
        CheckpointError: a base is given for a folder that is no adapter, or the base of the adapter does not exist.
    """
    if is_adapter(folder):
        return _base_folder(folder, read_adapter_config(folder)) if base is None else Path(base), folder
    if base is not None:
        raise CheckpointError(f"{folder} is not an adapter ({ADAPTER_CONFIG} is missing) for the base {base}")
    return folder, None


def load_adapter(model: PeftModel, adapter: str | Path, name: str) -> None:
    """Loads another adapter onto a model; ``model.set_adapter(name)`` activates it.

    Raises:
        CheckpointError: as ``load_model``, or an adapter of another family or size.
    """
    folder = resolve_folder(str(adapter))
    put_adapter(model, folder, name)
    mode, saved_mode = getattr(model.get_base_model().config, DOWNSAMPLE_MODE, None), saved_with(folder)
    if saved_mode not in (None, mode):
        logger.warning(
            "adapter %s was trained with %s %s, the model uses %s: set model.config.%s before using the adapter",
            folder,
            DOWNSAMPLE_MODE,
            saved_mode,
            mode,
            DOWNSAMPLE_MODE,
        )


def base_of(adapter: str | Path) -> Path:
    """The folder of the base checkpoint that an adapter names.

    Raises:
        CheckpointError: it is not an adapter, or its base does not exist.
    """
    folder = resolve_folder(str(adapter))
    return _base_folder(folder, read_adapter_config(folder))


def _load_full(
    folder: Path, tokenizer_required: bool, wish: str | None, trained: Path | None, options: dict[str, Any]
) -> PreTrainedModel:
    check_folder(folder)
    config, _ = MiniCPMVConfig.get_config_dict(folder)
    family = detect(config)
    if tokenizer_required:
        check_tokens(load_tokenizer(folder), family, vocab_size(config), str(folder), config)
    mode = decide(family, config, folder, wish, trained=trained)
    model = MODEL_CLASSES[config["model_type"]].from_pretrained(folder, **options)
    if mode is not None:
        # Not as an argument of from_pretrained, which would add it to the generation config too.
        setattr(model.config, DOWNSAMPLE_MODE, mode.name)
        if wish is None and mode.chosen and mode.overruled:  # set by the environment variable
            warn_once(logger, str(mode))
    return model


def _use_hub_kernels(model: PreTrainedModel) -> None:
    try:
        model.use_kernels = True
    except (ImportError, OSError, ValueError) as error:  # no package, no network, no kernel for this GPU
        raise CheckpointError(
            f"the kernels of transformers' hub mapping could not be loaded ({error}). Without network access omit "
            "--use_hub_kernels, or install the kernels themselves (pip install -e '.[linear]')"
        ) from error


def _base_folder(adapter: Path, settings: dict[str, Any]) -> Path:
    """The base checkpoint of an adapter; a relative path is resolved here, then in the folder of the adapter.

    Raises:
        CheckpointError: it is not recorded, or does not exist.
    """
    name = settings.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    for place in (expand(name), adapter / name):
        if place.is_dir():
            return place
    try:
        return resolve_folder(name, settings.get("revision"))
    except CheckpointError as error:
        raise CheckpointError(
            f"the base model {name} of adapter {adapter} is not there. Correct base_model_name_or_path in "
            f"{ADAPTER_CONFIG} ({error})"
        ) from error
