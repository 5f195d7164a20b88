"""Model folders and adapter folders become a model: completely, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from finetune.errors import CheckpointError
from finetune.families import detect
from finetune.families.common import vocab_size
from finetune.models.adapters import ADAPTER_CONFIG, put_adapter
from finetune.models.configuration import MiniCPMOConfig, MiniCPMVConfig
from finetune.models.folders import local_folder
from finetune.models.minicpmo import MiniCPMO
from finetune.models.minicpmv import MiniCPMV
from finetune.models.strict import check_folder
from finetune.models.tokenization import check_tokens, load_tokenizer
from finetune.models.whole import WHOLE_NETWORKS

# By the model_type of config.json.
NETWORKS: dict[str, type[PreTrainedModel]] = {
    MiniCPMVConfig.model_type: MiniCPMV,
    MiniCPMOConfig.model_type: MiniCPMO,
    **WHOLE_NETWORKS,
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
    hub_kernels: bool = False,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Loads a full checkpoint, or an adapter on top of the base checkpoint that it names.

    Adapters of the first published scripts (vpm_resampler_embedtokens.pt beside the adapter) are loaded whole.

    Every parameter of a loaded model requires gradients again; whoever trains it freezes what stays fixed afterwards.

    Args:
        model: local folder, or a hub id (the only case that may use the network).
        dtype: of the weights; "auto" is the file's.
        device_map: as in transformers ("auto", {"": 0}, ...).
        attn_implementation: "sdpa", "eager" or "flash_attention_2"; None lets transformers choose.
        revision: of the hub id.
        base: folder of the checkpoint that an adapter is put on; None for the one that the adapter names.
        adapter_name: under which an adapter can be chosen, where ``add_adapter`` puts more on the same base.
        tokenizer_required: also check that the tokenizer beside the weights has the tokens the family needs.
        hub_kernels: use the kernels that transformers' mapping names on the hub; downloads and runs code.
        **kwargs: handed on to ``from_pretrained`` (offload_folder, quantization_config, ...).

    Raises:
        CheckpointError: no such folder, files are missing, weights, config.json and tokenizer disagree, or kernels
            could not be downloaded.
        UnknownFamilyError: a config.json of none of the supported generations.
    """
    folder = local_folder(str(model), revision)
    options = {"dtype": dtype, "device_map": device_map, **kwargs}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return _load_adapter(folder, None if base is None else Path(base), adapter_name, tokenizer_required, options)
    if base is not None:
        raise CheckpointError(f"{folder} is no adapter ({ADAPTER_CONFIG} is missing): it cannot be put on {base}")
    return _load_full(folder, tokenizer_required, options, hub_kernels=hub_kernels)


def add_adapter(model: PeftModel, adapter: str | Path, name: str) -> None:
    """Puts another adapter on a loaded one; ``model.set_adapter(name)`` makes it the active one.

    Raises:
        CheckpointError: as ``load_model``, and an adapter of another family or size.
    """
    put_adapter(model, local_folder(str(adapter)), name)


def base_of(adapter: str | Path) -> Path:
    """The folder of the base checkpoint that an adapter names.

    Raises:
        CheckpointError: it is no adapter, or its base is not there.
    """
    folder = local_folder(str(adapter))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} is no adapter: {ADAPTER_CONFIG} is missing")
    return _base_folder(folder, json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")))


def _load_full(
    folder: Path, tokenizer_required: bool, options: dict[str, Any], *, hub_kernels: bool = False
) -> PreTrainedModel:
    check_folder(folder)
    config, _ = MiniCPMVConfig.get_config_dict(folder)
    family = detect(config)
    if tokenizer_required:
        check_tokens(load_tokenizer(folder), family, vocab_size(config), str(folder))
    model = NETWORKS[config["model_type"]].from_pretrained(folder, **options)
    if hub_kernels:
        _use_hub_kernels(model)
    return model


def _use_hub_kernels(model: PreTrainedModel) -> None:
    try:
        model.use_kernels = True
    except (ImportError, OSError, ValueError) as error:  # no package, no network, no kernel for this GPU
        raise CheckpointError(
            f"the kernels of transformers' hub mapping could not be loaded ({error}). Without network access leave "
            "--use_hub_kernels out, or install the kernels themselves (pip install -e '.[linear]')"
        ) from error


def _load_adapter(
    folder: Path, base_folder: Path | None, name: str, tokenizer_required: bool, options: dict[str, Any]
) -> PeftModel:
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = _load_full(base_folder or _base_folder(folder, settings), tokenizer_required, options)
    return put_adapter(base, folder, name)


def _base_folder(adapter: Path, settings: dict[str, Any]) -> Path:
    """The base checkpoint of an adapter; a relative path is looked up here, then beside the adapter.

    Raises:
        CheckpointError: it is recorded nowhere, or no longer where it was.
    """
    name = settings.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    for place in (Path(name).expanduser(), adapter / name):
        if place.is_dir():
            return place
    try:
        return local_folder(name, settings.get("revision"))
    except CheckpointError as error:
        raise CheckpointError(
            f"the base model {name} of adapter {adapter} is not there. Correct base_model_name_or_path in "
            f"{ADAPTER_CONFIG} ({error})"
        ) from error
