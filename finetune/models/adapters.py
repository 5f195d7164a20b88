"""Loads LoRA adapters onto a base model, after checking that files are complete and shapes match."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from finetune.families import by_name, detect
from finetune.families.family import Family
from finetune.model_folders.checkpoint_folder import ADAPTER_CONFIG, read_adapter_config
from finetune.model_folders.output_contents import RUN_FILE
from finetune.model_folders.weight_headers import check_not_truncated
from finetune.models.adapter_biases import PeftModelWithBiases, biases, is_base_bias, trains_biases
from finetune.models.duplex_rows import rows_for
from finetune.models.finite_weights import check_file, check_types, finite
from finetune.models.strict_loading import some
from finetune.runtime.imports import optional_libraries_hidden
from finetune.utils.errors import CheckpointError, UserError
from finetune.utils.json_objects import read_object
from finetune.utils.log_once import warn_once

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The first published scripts saved modules trained in full beside the adapter, under the names of the training run.
_FIRST_WEIGHTS = "vpm_resampler_embedtokens.pt"
_FIRST_PARTS = ("vpm", "resampler", "embed_tokens")
ADAPTER_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(\.(base_layer|original_module))+\.")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def put_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """Loads an adapter onto a model, which may have other adapters.

    The first one is active; ``set_adapter(name)`` activates another, ``disable_adapter()`` gives the base model. An
    adapter that trains biases of the base's layers has to be the only one: all of a model's adapters share them.

    Args:
        model: the base model, without or with other adapters.
        folder: adapter_config.json with adapter_model.safetensors; of the first published scripts also
            vpm_resampler_embedtokens.pt.
        name: name of the adapter for ``set_adapter``.

    Raises:
        CheckpointError: files are missing or damaged, the name is taken, the adapter belongs to a model of another
            family or size, or one of several adapters trains biases.
    """
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise CheckpointError(f"{folder}: there is an adapter called {name!r} already; give it another name")
    rows_for(model, folder)
    taken = {part for path, _ in base_model_of(model).named_modules() for part in path.split(".")}
    if not name or "." in name or name in taken:  # peft searches adapter names in the parts of module paths
        raise CheckpointError(f"{folder}: {name!r} cannot be the name of an adapter; give another")
    settings, weights = check_adapter(folder), folder / ADAPTER_WEIGHTS
    beside = trained_beside(folder)
    shapes = stored_shapes(weights) | {name: tuple(tensor.shape) for name, tensor in beside.items()}
    check_fit(model, folder, settings, shapes)
    _check_biases(model, folder, settings)
    # A base in 4 bit has imported bitsandbytes already, and what is imported is not hidden.
    with peft_errors(folder), optional_libraries_hidden():
        if beside:
            return _put_first_generation(model, folder, beside, name)
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name)
            adapted = model
        elif trains_biases(settings):
            adapted = _with_biases(model, folder, name)
        else:
            adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    check_complete(adapted, weights, set(shapes), name)
    return adapted


def _check_biases(model: PreTrainedModel | PeftModel, folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses several adapters of which one trains biases: they lie in the base's layers, so each would get them.

    Raises:
        CheckpointError: naming the adapter with biases.
    """
    if not isinstance(model, PeftModel):
        return
    there = next((name for name, config in model.peft_config.items() if trains_biases(config.to_dict())), None)
    if there is None and not trains_biases(settings):
        return
    which = "it" if there is None else f"the adapter {there!r} on the model"
    raise CheckpointError(
        f"{folder} cannot be loaded beside another adapter: {which} has trained biases (--lora_bias), which would "
        "change every adapter of the model. Load one at a time, or merge the one with biases (python -m finetune "
        "export)"
    )


def _with_biases(model: PreTrainedModel, folder: Path, name: str) -> PeftModel:
    config = PeftConfig.from_pretrained(str(folder))
    config.task_type = None  # those of peft have classes of their own
    before = biases(model)
    adapted = PeftModelWithBiases.from_pretrained(model, str(folder), adapter_name=name, config=config)
    names = {
        parameter: base_model_name(parameter.removeprefix(ADAPTER_PREFIX))
        for parameter, _ in adapted.named_parameters()
    }
    assert isinstance(adapted, PeftModelWithBiases)
    kept = {parameter: before[own] for parameter, own in names.items() if own in before and is_base_bias(parameter)}
    adapted.keep_base_biases(kept)
    return adapted


def base_model_of(model: PreTrainedModel | PeftModel) -> Any:
    """The model without peft's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_adapter(folder: Path) -> dict[str, Any]:
    """Checks an adapter folder: configuration, weights file not truncated, values finite, ranks as configured.

    Returns:
        The content of adapter_config.json.

    Raises:
        CheckpointError: a check failed.
    """
    settings = read_adapter_config(folder)
    if not settings.get("target_modules") and not settings.get("target_parameters"):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} has neither target_modules nor target_parameters")
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{folder} has {ADAPTER_CONFIG} but not {ADAPTER_WEIGHTS}")
    if (pickled := folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} has two sets of weights, {ADAPTER_WEIGHTS} and {pickled.name}, which may differ: keep the one "
            "that is meant and move the other out of the folder"
        )
    check_not_truncated(weights)
    check_types(weights)
    check_file(weights)
    _check_ranks(settings, weights)
    return settings


def _check_ranks(settings: Mapping[str, Any], weights: Path) -> None:
    """Compares ranks with the configuration; not of adapters on parameters, whose tensors have the rows of all experts.

    Raises:
        CheckpointError: a tensor of another rank.
    """
    if settings.get("target_parameters"):
        return
    known = {settings.get("r"), *(settings.get("rank_pattern") or {}).values()}
    for name, shape in stored_shapes(weights).items():
        if (found := _LORA.fullmatch(name)) and (rank := shape[0 if found["side"] == "A" else 1]) not in known:
            raise CheckpointError(
                f"{weights}: {name} is of rank {rank}, {ADAPTER_CONFIG} beside it says {' or '.join(map(str, known))}: "
                "the files belong to different adapters; copy or download both again"
            )


@contextmanager
def peft_errors(folder: Path) -> Iterator[None]:
    """Turns errors of peft and torch about an adapter that cannot be loaded onto its base into one line.

    Raises:
        CheckpointError: with their message.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except KeyError as error:  # a module saved in full lacks a tensor
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} lacks tensors of the adapter: {error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), None)
        reason = reason or " ".join(str(error).split())
        raise CheckpointError(
            f"the adapter {folder} cannot be loaded onto its base, {ADAPTER_CONFIG} and its weights disagree or do not "
            f"match it: {reason}"
        ) from error


def stored_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, by name."""
    with safe_open(str(weights), framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def trained_beside(folder: Path) -> dict[str, torch.Tensor]:
    """Modules trained in full that the first published scripts saved beside the adapter, by names as in adapter files.

    Raises:
        CheckpointError: the file has more than tensors, or tensors of other parts.
    """
    file = folder / _FIRST_WEIGHTS
    if not file.is_file():
        return {}
    try:
        given: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} is damaged, or holds more than tensors and is not read: {error}") from error
    result = {}
    for name, tensor in given.items():
        if ".original_module." in name:  # the frozen original that peft keeps beside a module trained in full
            continue
        plain = name.removeprefix(ADAPTER_PREFIX).replace(".modules_to_save.default.", ".")
        if not any(f".{part}." in f".{plain}" for part in _FIRST_PARTS) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{file} has {name}, which is not of {', '.join(_FIRST_PARTS)}")
        if not tensor.numel():
            raise CheckpointError(f"{file}: {name} is empty, as ZeRO-3 leaves it when weights are not gathered")
        if not finite(tensor):
            raise CheckpointError(f"{file}: {name} has values that are not finite (NaN or infinity)")
        result[ADAPTER_PREFIX + plain] = tensor
    return result


def lora_config_of(folder: Path, beside: dict[str, torch.Tensor]) -> LoraConfig:
    """The configuration of a LoRA adapter for inference.

    Args:
        folder: folder with adapter_config.json.
        beside: from ``trained_beside``; its modules are added to modules_to_save.

    Raises:
        CheckpointError: it is another kind of adapter.
    """
    read_adapter_config(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder} is not a LoRA adapter but {config.peft_type}")
    parts = {part for part in _FIRST_PARTS if any(f".{part}." in key for key in beside)}
    config.modules_to_save = sorted(parts | set(config.modules_to_save or ())) or None
    config.inference_mode = True
    return config


def _put_first_generation(
    model: PreTrainedModel | PeftModel, folder: Path, beside: dict[str, torch.Tensor], name: str
) -> PeftModel:
    """Loads modules saved beside the adapter as modules_to_save, so that disabling the adapter gives the base model."""
    config = lora_config_of(folder, beside)
    inside = {
        ADAPTER_PREFIX + key: tensor
        for key, tensor in _tensors(base_model_of(model)).items()
        if any(f".{part}." in f".{key}" for part in config.modules_to_save or ())
    }
    state = {**inside, **load_file(folder / ADAPTER_WEIGHTS), **beside}
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        adapted = model
    else:
        adapted = PeftModel(model, config, adapter_name=name)
    stored = set(state)
    set_peft_model_state_dict(adapted, state, adapter_name=name)  # peft 0.20 removes entries from the dictionary
    adapted.eval()
    check_complete(adapted, folder / ADAPTER_WEIGHTS, stored, name)
    return adapted


def check_complete(adapted: PeftModel, weights: Path, stored: set[str], name: str) -> None:
    """Checks that an adapter's files have exactly the tensors that its configuration describes.

    Raises:
        CheckpointError: naming missing or unexpected tensors.
    """
    expected = _own_tensors(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    stored = _own_tensors(stored)
    if missing := sorted(expected - stored):
        raise CheckpointError(f"{weights} lacks tensors of the adapter: {some(missing)}")
    if surplus := sorted(stored - expected):
        raise CheckpointError(
            f"{weights} has {len(surplus)} tensors that {ADAPTER_CONFIG} does not describe: {some(surplus)}"
        )


def _own_tensors(names: Iterable[str]) -> set[str]:
    """Without the second copies that peft writes of biases in modules trained in full, under the adapter's name."""
    return {name for name in names if ".modules_to_save." not in name and ".original_module." not in name}


def _tensors(base_model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the base model under their original names, without adapters."""
    return {
        base_model_name(name): tensor
        for name, tensor in base_model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def base_model_name(name: str) -> str:
    """The name of a module or tensor in the base model, without the wrappers of peft."""
    return _WRAPPERS.sub(".", f"{name}.")[:-1]


def check_fit(
    model: PreTrainedModel | PeftModel, folder: Path, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Refuses an adapter of another family or size before peft changes the model.

    Raises:
        CheckpointError: with the names of both.
    """
    base_model = base_model_of(model)
    family = detect(base_model.config.to_dict())
    theirs = _trained_on(folder, settings)
    mismatch = None
    if missing := _missing_module(base_model, settings.get("modules_to_save") or ()):
        warn_once(
            logger, f"{folder}: its modules_to_save names {missing}, which is no module of {family.title}: no effect"
        )
    if theirs is not None and theirs is not family:
        mismatch = "they are different models"
    elif not settings.get("layer_replication"):  # which changes layer numbers
        mismatch = _mismatch(base_model, shapes, settings.get("target_parameters") or ())
    if mismatch:
        title = f"{theirs.title}, " if theirs else ""
        raise CheckpointError(
            f"the adapter {folder} was trained on {title}{settings.get('base_model_name_or_path') or 'an unnamed base'}"
            f" and does not fit {family.title}, {base_model.name_or_path or 'this model'}: {mismatch}"
        )


def _missing_module(base_model: nn.Module, saved: Sequence[str]) -> str | None:
    """The first of some module names (their last parts) that no module has."""
    names = [f".{base_model_name(name)}" for name, _ in base_model.named_modules()]
    return next((name for name in saved if not any(known.endswith(f".{name}") for known in names)), None)


def _trained_on(folder: Path, settings: dict[str, Any]) -> Family | None:
    """The family that an adapter was trained on, by its run.yaml or its base; None if unknown."""
    run = folder / RUN_FILE
    base = Path(str(settings.get("base_model_name_or_path") or "."))
    try:
        if run.is_file():
            return by_name(yaml.safe_load(run.read_text(encoding="utf-8"))["base"]["family"])
        for place in (base, folder / base):
            if (config := place / "config.json").is_file():
                return detect(read_object(config))
    except (KeyError, TypeError, yaml.YAMLError, UserError):
        return None  # not files of this toolkit; shapes are compared instead
    return None


def _mismatch(base_model: nn.Module, shapes: dict[str, tuple[int, ...]], targets: Sequence[str]) -> str | None:
    """A message about the first tensor of an adapter that does not match the model; None if all match.

    Args:
        base_model: the model to load the adapter onto.
        shapes: shapes of the adapter's tensors, by name.
        targets: target_parameters of the adapter.
    """
    modules = {base_model_name(name): module for name, module in base_model.named_modules()}
    own = {name: tuple(tensor.shape) for name, tensor in _tensors(base_model).items() if tensor.is_floating_point()}
    for name, shape in sorted(shapes.items()):
        plain = name.removeprefix(ADAPTER_PREFIX)
        found = _LORA.fullmatch(plain)
        if found is None:
            if plain in own and own[plain] != shape:
                return f"{plain} is {shape} there, {own[plain]} here"
            continue
        path = base_model_name(found["module"])
        module = modules.get(path)
        if module is None:
            return f"it has no {path}"
        there = shape[1] if found["side"] == "A" else shape[0]
        here = getattr(module, "in_features" if found["side"] == "A" else "out_features", there)
        if adapted := _adapted_parameters(path, module, targets):
            # Adapters of several parameters are nested: the innermost belongs to the first parameter.
            inside = found["module"].count(".base_layer")
            if inside >= len(adapted):
                return f"{name} is on a parameter that {ADAPTER_CONFIG} does not name"
            path, parameter = adapted[-1 - inside]
            here, ranks = parameter.shape[-1 if found["side"] == "A" else -2], shape[0 if found["side"] == "A" else 1]
            if parameter.ndim == 3 and ranks % len(parameter):
                return f"{path} has {len(parameter)} experts here, {name} has {ranks} rows of all experts together"
        if here != there:
            side = "takes" if found["side"] == "A" else "gives"
            return f"{path} {side} {there} values there, {here} here"
    return None


def _adapted_parameters(path: str, module: nn.Module, targets: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module that target_parameters match, by full name, in the module's order."""
    named = ((f"{path}.{name}", parameter) for name, parameter in module.named_parameters(recurse=False))
    return [(name, value) for name, value in named if any(f".{name}".endswith(f".{end}") for end in targets)]
