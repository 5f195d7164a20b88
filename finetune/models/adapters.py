"""Adapters on a network: looked at before anything is touched, completely loaded or not at all."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
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
from finetune.models.checkpoint_folder import ADAPTER_CONFIG, read_adapter_config
from finetune.models.finite_weights import check_file, check_types, finite
from finetune.models.strict_loading import check_not_truncated, some
from finetune.utils.errors import CheckpointError, UserError
from finetune.utils.json_objects import read_object
from finetune.utils.log_once import warn_once

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The first published scripts left what was trained in full beside the adapter, under the names of their training.
_FIRST_WEIGHTS = "vpm_resampler_embedtokens.pt"
_FIRST_PARTS = ("vpm", "resampler", "embed_tokens")
ADAPTER_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(\.(base_layer|original_module))+\.")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def put_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """Puts an adapter on a network, beside those that it has already.

    The first one is active; ``set_adapter(name)`` changes that, and ``disable_adapter()`` gives the base.

    Args:
        model: the base, or the same with other adapters.
        folder: adapter_config.json with adapter_model.safetensors; of the first published scripts also
            vpm_resampler_embedtokens.pt.
        name: under which the adapter can be chosen.

    Raises:
        CheckpointError: files are missing or damaged, the name is taken, or the adapter belongs to a network of
            another family or size.
    """
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise CheckpointError(f"{folder}: there is an adapter called {name!r} already; give it another name")
    pieces = {piece for path, _ in base_model_of(model).named_modules() for piece in path.split(".")}
    if not name or "." in name or name in pieces:  # peft looks for names between the dots of a path
        raise CheckpointError(f"{folder}: {name!r} cannot be the name of an adapter; give another")
    settings, weights = check_adapter(folder), folder / ADAPTER_WEIGHTS
    beside = trained_beside(folder)
    shapes = stored_shapes(weights) | {name: tuple(tensor.shape) for name, tensor in beside.items()}
    check_fit(model, folder, settings, shapes)
    with peft_errors(folder):
        if beside:
            return _put_first_generation(model, folder, beside, name)
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    check_complete(adapted, weights, set(shapes), name)
    return adapted


def base_model_of(model: PreTrainedModel | PeftModel) -> Any:
    """The network itself, without adapters around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_adapter(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder, whose weights are there, whole and finite.

    Raises:
        CheckpointError: they are not, or the configuration is not what it should be.
    """
    settings = read_adapter_config(folder)
    if not settings.get("target_modules") and not settings.get("target_parameters"):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: neither target_modules nor target_parameters says what is adapted"
        )
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{folder} has {ADAPTER_CONFIG} but not {ADAPTER_WEIGHTS}")
    check_not_truncated(weights)
    check_types(weights)
    check_file(weights)
    _check_ranks(settings, weights)
    return settings


def _check_ranks(settings: Mapping[str, Any], weights: Path) -> None:
    """Of adapters on parameters the rows of all experts are one tensor: their ranks are left to peft."""
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
    """What peft and torch say of an adapter that cannot be put on its base, as one line.

    Raises:
        CheckpointError: with their reason.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except KeyError as error:  # of a module saved in full that lacks a tensor
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} lacks tensors of the adapter: {error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), None)
        reason = reason or " ".join(str(error).split())
        raise CheckpointError(
            f"the adapter {folder} cannot be put on its base, {ADAPTER_CONFIG} and its weights disagree or do not fit "
            f"it: {reason}"
        ) from error


def stored_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, by name."""
    with safe_open(str(weights), framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping


def trained_beside(folder: Path) -> dict[str, torch.Tensor]:
    """What the first scripts saved beside the adapter, under the names that an adapter file has.

    Raises:
        CheckpointError: the file is not one of plain tensors, or holds other parts.
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
        if ".original_module." in name:  # the base's own, which peft keeps beside a module trained in full
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
    """The configuration of a LoRA adapter, to compute with and not to train.

    Args:
        folder: with adapter_config.json.
        beside: what ``trained_beside`` found: it counts as modules saved with the adapter.

    Raises:
        CheckpointError: it is another kind of adapter.
    """
    read_adapter_config(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder} is no LoRA adapter but {config.peft_type}")
    parts = {part for part in _FIRST_PARTS if any(f".{part}." in key for key in beside)}
    config.modules_to_save = sorted(parts | set(config.modules_to_save or ())) or None
    config.inference_mode = True
    return config


def _put_first_generation(
    model: PreTrainedModel | PeftModel, folder: Path, beside: dict[str, torch.Tensor], name: str
) -> PeftModel:
    """As modules saved with the adapter, so that switching it off gives the base back."""
    config = lora_config_of(folder, beside)
    network = base_model_of(model)
    inside = {
        ADAPTER_PREFIX + key: tensor
        for key, tensor in _tensors(network).items()
        if any(f".{part}." in f".{key}" for part in config.modules_to_save or ())
    }
    state = {**inside, **load_file(folder / ADAPTER_WEIGHTS), **beside}
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        adapted = model
    else:
        adapted = PeftModel(model, config, adapter_name=name)
    stored = set(state)
    set_peft_model_state_dict(adapted, state, adapter_name=name)  # peft 0.20 takes entries out of the dictionary
    adapted.eval()
    check_complete(adapted, folder / ADAPTER_WEIGHTS, stored, name)
    return adapted


def check_complete(adapted: PeftModel, weights: Path, stored: set[str], name: str) -> None:
    """Checks that an adapter's files have the tensors that its configuration describes, and no others.

    Raises:
        CheckpointError: naming those that are missing or surplus.
    """
    expected = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    if missing := sorted(expected - stored):
        raise CheckpointError(f"{weights} lacks tensors of the adapter: {some(missing)}")
    if surplus := sorted(stored - expected):
        raise CheckpointError(
            f"{weights} has {len(surplus)} tensors that {ADAPTER_CONFIG} does not describe: {some(surplus)}"
        )


def _tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's own tensors under their own names, whatever adapters have been put around them."""
    return {
        own_name(name): tensor
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def own_name(name: str) -> str:
    """The name of a module or tensor of the base, without what adapters around it add."""
    return _WRAPPERS.sub(".", f"{name}.")[:-1]


def check_fit(
    model: PreTrainedModel | PeftModel, folder: Path, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Refuses an adapter of another family or size before peft changes the network.

    Raises:
        CheckpointError: with the names of both.
    """
    network = base_model_of(model)
    family = detect(network.config.to_dict())
    theirs = _trained_on(folder, settings)
    misfit = None
    if gone := _gone(network, settings.get("modules_to_save") or ()):
        warn_once(
            logger, f"{folder}: its modules_to_save names {gone}, which is no module of {family.title}: no effect"
        )
    if theirs is not None and theirs is not family:
        misfit = "they are different networks"
    elif not settings.get("layer_replication"):  # which gives layers other numbers
        misfit = _misfit(network, shapes, settings.get("target_parameters") or ())
    if misfit:
        title = f"{theirs.title}, " if theirs else ""
        raise CheckpointError(
            f"the adapter {folder} was trained on {title}{settings.get('base_model_name_or_path') or 'an unnamed base'}"
            f" and does not fit {family.title}, {network.name_or_path or 'this network'}: {misfit}"
        )


def _gone(network: nn.Module, saved: Sequence[str]) -> str | None:
    """The first of some ends of module names that no module has."""
    names = [f".{own_name(name)}" for name, _ in network.named_modules()]
    return next((name for name in saved if not any(known.endswith(f".{name}") for known in names)), None)


def _trained_on(folder: Path, settings: dict[str, Any]) -> Family | None:
    """The family that an adapter was trained on, where its run or its base says so."""
    run = folder / "run.yaml"
    base = Path(str(settings.get("base_model_name_or_path") or "."))
    try:
        if run.is_file():
            return by_name(yaml.safe_load(run.read_text(encoding="utf-8"))["base"]["family"])
        for place in (base, folder / base):
            if (config := place / "config.json").is_file():
                return detect(read_object(config))
    except (KeyError, TypeError, yaml.YAMLError, UserError):
        return None  # a run.yaml or a base of something else; the shapes decide
    return None


def _misfit(network: nn.Module, shapes: dict[str, tuple[int, ...]], targets: Sequence[str]) -> str | None:
    """The first tensor of an adapter that has no place in the network, in words.

    Args:
        network: that the adapter is to be put on.
        shapes: of the adapter's tensors, by name.
        targets: ends of the names of the parameters that it adapts, as peft has them.
    """
    modules = {own_name(name): module for name, module in network.named_modules()}
    own = {name: tuple(tensor.shape) for name, tensor in _tensors(network).items() if tensor.is_floating_point()}
    for name, shape in sorted(shapes.items()):
        plain = name.removeprefix(ADAPTER_PREFIX)
        found = _LORA.fullmatch(plain)
        if found is None:
            if plain in own and own[plain] != shape:
                return f"{plain} is {shape} there, {own[plain]} here"
            continue
        path = own_name(found["module"])
        module = modules.get(path)
        if module is None:
            return f"it has no {path}"
        there = shape[1] if found["side"] == "A" else shape[0]
        here = getattr(module, "in_features" if found["side"] == "A" else "out_features", there)
        if adapted := _adapted_parameters(path, module, targets):
            # One adapter around the other: the innermost belongs to the first parameter.
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
    """The parameters of a module that an adapter of parameters is for, by whole name, in the module's order."""
    named = ((f"{path}.{name}", parameter) for name, parameter in module.named_parameters(recurse=False))
    return [(name, value) for name, value in named if any(f".{name}".endswith(f".{end}") for end in targets)]
