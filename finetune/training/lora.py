"""LoRA: new adapters from the flags, or continued training of a saved adapter."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from finetune.arguments.model import LoraArguments
from finetune.families.family import Family
from finetune.model_folders.checkpoint_folder import has_adapter, nearest_folders
from finetune.model_folders.duplex_prompt import DUPLEX_PROMPT
from finetune.models.adapters import ADAPTER_WEIGHTS, check_adapter, check_fit, peft_errors, stored_shapes
from finetune.models.experts import expert_names
from finetune.templates.duplex_fc import FIRST_ID, LAST_ID
from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)

# Only the LLM's linear layers are quantised; the rest is small, trained in full, or reads its weights directly. The
# gate projections of linear attention have a few rows only, which a CPU cannot hold in 4 bit.
_NOT_QUANTISED = ["vpm", "resampler", "lm_head", "apm", "audio_projection_layer", "tts"]
_NOT_QUANTISED += ["model.vision_tower", "model.merger", "in_proj_a", "in_proj_b"]
_ALL_LINEAR = ("all-linear", "all")
# Names of modules, not a pattern: q_proj,v_proj
_NAMES = re.compile(r"[A-Za-z_][\w.]*(\s*,\s*[A-Za-z_][\w.]*)*")
# Settings that decide the shapes or the computation of an adapter.
_DECISIVE = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "bias",
    "use_rslora",
    "use_dora",
)


def quantisation(dtype: str) -> BitsAndBytesConfig:
    """4 bit nf4 with double quantisation for the LLM's linear layers, computing in ``dtype``."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=list(_NOT_QUANTISED),
    )


def add_lora(
    model: nn.Module,
    family: Family,
    saved: Sequence[str],
    lora: LoraArguments,
    parts: Sequence[str] = ("llm",),
    *,
    in_fp32: bool = True,
) -> PeftModel:
    """The model with adapters.

    Args:
        model: the loaded model.
        family: its generation; names the default targets.
        saved: modules trained in full and saved with the adapter.
        lora: the lora_* flags; with ``lora_weight_path`` the training of that adapter is continued.
        parts: the parts of the model that get adapters.
        in_fp32: adapters on 16-bit weights are fp32; False where DeepSpeed keeps fp32 master weights, as ZeRO-3
            requires one dtype for all trained weights.

    Raises:
        ArgumentError: targets or modules that the model does not have, or an adapter that does not match the flags.
    """
    config = lora_config(model, family, saved, lora, parts)
    if lora.lora_weight_path is not None:
        return _continue(model, config, Path(lora.lora_weight_path), in_fp32)
    _check_saved_modules(model, config.modules_to_save or [])
    _warn_of_ties(model, config.modules_to_save or [])
    try:
        base: Any = model
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(?s).*tied")  # names a setting of peft that no flag sets
            adapted: Any = get_peft_model(base, config, autocast_adapter_dtype=in_fp32)
        return _only_new_rows(adapted)
    except ValueError as error:
        if (fault := _fault_of_flags(error, family, lora, parts)) is None:
            raise
        raise fault from error


def _fault_of_flags(
    error: ValueError, family: Family, lora: LoraArguments, parts: Sequence[str]
) -> ArgumentError | None:
    """The error of the flags behind one of peft; None for another error."""
    if "layers attribute" in str(error):
        return ArgumentError(f"--lora_layer_replication: peft does not support it for this model ({error})")
    if "target" not in str(error):
        return None
    layers, targets = lora.lora_layers_to_transform, lora.lora_target_modules or default_targets(family, parts)
    return ArgumentError(
        f"--lora_target_modules {targets!r} matches no module{'' if layers is None else f' in the layers {layers}'}; "
        f"it is a regular expression that must match the whole name, such as {family.lora_targets['llm']}"
    )


def _check_saved_modules(model: nn.Module, saved: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    for wanted in saved:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise ArgumentError(f"--lora_modules_to_save {wanted}: the model has no module of that name")


def _warn_of_ties(model: Any, saved: Sequence[str]) -> None:
    """Says that tied embeddings and output layer part when one of them is trained in full."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(end is None for end in ends) or ends[0].weight is not ends[1].weight:
        return
    names = [name.rpartition(".")[2] for end in ends for name, module in model.named_modules() if module is end]
    if len(trained := [name for name in names if name in saved]) == 1:
        other = next(name for name in names if name not in trained)
        logger.warning(
            "--lora_modules_to_save %s: it is one tensor with %s in this checkpoint; trained, it becomes a second "
            "tensor, and %s keeps the values of the base",
            trained[0],
            other,
            other,
        )


def lora_config(
    model: nn.Module, family: Family, saved: Sequence[str], lora: LoraArguments, parts: Sequence[str] = ("llm",)
) -> LoraConfig:
    """The peft configuration of the flags.

    task_type stays None: AutoPeftModel refuses any other (the model is loaded by AutoModel).

    Raises:
        ArgumentError: a flag that cannot be parsed.
    """
    extra = [name.strip() for name in (lora.lora_modules_to_save or "").split(",") if name.strip()]
    parameters = target_parameters(model, family, parts, lora)
    targets: str | list[str] = lora.lora_target_modules or default_targets(family, parts)
    if odd := sorted({character for character in targets if not character.isascii()}):
        logger.warning("--lora_target_modules %s: %s is not ASCII and matches no module name", targets, " ".join(odd))
    if targets in _ALL_LINEAR:
        targets = all_linear(model, family, parts)
    elif _NAMES.fullmatch(targets):
        targets = named_targets(model, family, parts, targets)
    pattern = None
    if lora.lora_layers_to_transform is not None:
        # peft takes layer numbers only with a list of names. Names such as q_proj would match the vision tower too, and
        # full names are not filtered by layer.
        pattern = lora.lora_layers_pattern or "layers"
        names = (name for name, _ in model.named_modules() if re.fullmatch(targets, name))
        targets = [name for name in names if _in_layers(lora)(name)]
    elif lora.lora_layers_pattern is not None:
        logger.warning("--lora_layers_pattern has no effect without --lora_layers_to_transform")
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        target_parameters=parameters,
        bias=lora.lora_bias,  # pyright: ignore[reportArgumentType]
        modules_to_save=[*saved, *extra] or None,
        layers_to_transform=lora.lora_layers_to_transform,
        layers_pattern=pattern,
        layer_replication=_replication(lora.lora_layer_replication),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        trainable_token_indices=_new_rows(model, [*saved, *extra]),
    )


def _new_rows(model: Any, saved: Sequence[str]) -> dict[str, list[int]] | None:
    """The rows of the full-duplex prompt o45_fc, by module; None for a model without them.

    A module that is trained in full trains them anyway.
    """
    if getattr(model.config, DUPLEX_PROMPT, None) is None:
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name.rpartition(".")[2] for end in ends for name, module in model.named_modules() if module is end]
    rows = list(range(FIRST_ID, LAST_ID))
    return {name: rows for name in names if name not in saved} or None


def target_parameters(model: nn.Module, family: Family, parts: Sequence[str], lora: LoraArguments) -> list[str] | None:
    """Full names of the expert weights that get adapters, in the layers of the flags; None for none.

    Raises:
        ArgumentError: a dense model, or a name that no weight of experts or routers in those parts ends with.
    """
    prefixes = tuple(f"{prefix}." for part in parts for prefix in family.parts.get(part, ()))
    known = [name for name in expert_names(model) if name.startswith(prefixes)]
    if lora.lora_target_parameters is None:
        if known:
            logger.info(
                "experts are parameters, not linear layers, and stay frozen; --lora_target_parameters %s adapts them",
                ",".join(name for name in _ends(known) if not name.endswith(".weight")),
            )
        return None
    found: list[str] = []
    for wanted in (name.strip() for name in lora.lora_target_parameters.split(",") if name.strip()):
        matching = [name for name in known if f".{name}".endswith(f".{wanted}") and _in_layers(lora)(name)]
        if not matching:
            what = (
                f"it has {', '.join(_ends(known))}"
                if known
                else f"the {' and '.join(parts)} of this {family.title} has none"
            )
            raise ArgumentError(f"--lora_target_parameters {wanted}: no weight of experts is called so; {what}")
        found += matching
    return sorted(set(found))


def _ends(names: Sequence[str]) -> list[str]:
    """The names of weights without their layers."""
    return sorted({re.sub(r".*\.\d+\.", "", name) for name in names})


def _in_layers(lora: LoraArguments) -> Callable[[str], Any]:
    """Whether a name lies in the layers that get adapters."""
    if lora.lora_layers_to_transform is None:
        return lambda _: True
    numbers = "|".join(map(str, lora.lora_layers_to_transform))
    return re.compile(rf"(.*\.)?{re.escape(lora.lora_layers_pattern or 'layers')}\.({numbers})\..*").fullmatch


def default_targets(family: Family, parts: Sequence[str]) -> str:
    """The attention projections of some parts, as a regular expression.

    Raises:
        ArgumentError: a part that the family does not have.
    """
    for part in parts:
        if part not in family.lora_targets:
            known = ", ".join(family.lora_targets)
            raise ArgumentError(f"--lora_parts {part}: {family.title} has no {part} part; it has {known}")
    return "|".join(family.lora_targets[part] for part in parts)


def all_linear(model: nn.Module, family: Family, parts: Sequence[str]) -> str:
    """Every linear layer of some parts but the output layer, as a regular expression for all layer numbers.

    Raises:
        ArgumentError: a part that the family does not have.
    """
    return "|".join(dict.fromkeys(_any_layer(name) for name in _linear(model, family, parts)))


def named_targets(model: nn.Module, family: Family, parts: Sequence[str], given: str) -> str:
    """The linear layers of some parts whose names end with one of some names, as a regular expression.

    A full module name is matched exactly.

    Raises:
        ArgumentError: a name that no linear layer of those parts has, or a part that the family does not have.
    """
    names = [name.strip() for name in given.split(",")]
    full_names = {name for name, _ in model.named_modules()}
    inside = _linear(model, family, parts)
    patterns: dict[str, None] = {}
    for wanted in names:
        found = [wanted] if wanted in full_names else [name for name in inside if f".{name}".endswith(f".{wanted}")]
        if not found:
            known = sorted({name.rpartition(".")[2] for name in inside})
            raise ArgumentError(
                f"--lora_target_modules {given}: no linear layer of {', '.join(parts)} is called {wanted}; there are "
                f"{', '.join(known)}"
            )
        patterns.update(
            dict.fromkeys(re.escape(wanted) if wanted in full_names else _any_layer(name) for name in found)
        )
    return "|".join(patterns)


def _linear(model: nn.Module, family: Family, parts: Sequence[str]) -> list[str]:
    """Names of the linear layers of some parts, without the output layer."""
    default_targets(family, parts)
    output = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    prefixes = tuple(f"{prefix}." for part in parts for prefix in family.parts[part])
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(prefixes) and isinstance(module, nn.Linear) and module is not output
    ]


def _any_layer(name: str) -> str:
    """A module name as a pattern that matches the same module of every layer."""
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))


def _replication(given: str | None) -> list[tuple[int, int]] | None:
    if given is None:
        return None
    try:
        return [(int(start), int(end)) for start, end in json.loads(given)]
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"--lora_layer_replication {given!r}: it must be pairs of layer numbers, such as [[0, 16], [8, 24]]"
        ) from error


def _continue(model: nn.Module, wanted: LoraConfig, folder: Path, in_fp32: bool) -> PeftModel:
    if not has_adapter(folder):
        raise ArgumentError(
            f"--lora_weight_path {folder}: no adapter there (adapter_config.json is missing){nearest_folders(folder)}"
        )
    settings = check_adapter(folder)
    check_fit(model, folder, settings, stored_shapes(folder / ADAPTER_WEIGHTS))  # pyright: ignore[reportArgumentType]
    found = LoraConfig.from_pretrained(str(folder))
    assert isinstance(found, LoraConfig)
    if _as_set(found.modules_to_save) != _as_set(wanted.modules_to_save):
        raise ArgumentError(
            f"--lora_weight_path {folder} saves {_names(found.modules_to_save)} in full, the flags train "
            f"{_names(wanted.modules_to_save)}; set --tune_vision, --tune_resampler and --lora_modules_to_save alike"
        )
    if found.trainable_token_indices != wanted.trainable_token_indices:
        these = ("with", "has not") if found.trainable_token_indices else ("without", "adds")
        raise ArgumentError(
            f"--lora_weight_path {folder} was trained {these[0]} the rows of --duplex_prompt o45_fc, which this run "
            f"{these[1]}; set the flag alike, or train a new adapter"
        )
    for name in _DECISIVE:
        here, there = getattr(wanted, name), getattr(found, name)
        if name != "modules_to_save" and _comparable(here) != _comparable(there):
            logger.warning("--lora_weight_path %s: its %s %s is used, not %s of the flags", folder, name, there, here)
    base: Any = model
    with peft_errors(folder):
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True, autocast_adapter_dtype=in_fp32)
    return _only_new_rows(model)


def _only_new_rows(model: PeftModel) -> PeftModel:
    """A model whose checkpoints have the added rows alone, not all of the embeddings.

    peft saves all where the base that an adapter names has fewer rows than the model. What is saved names the base
    (``checkpoints.saving.finish_adapter``).
    """
    config: Any = model.peft_config[model.active_adapter]  # pyright: ignore[reportArgumentType]
    if config.trainable_token_indices is not None:
        config.base_model_name_or_path = ""
    return model


def _comparable(value: Any) -> Any:
    return frozenset(value) if isinstance(value, (list, set, tuple)) else value


def _as_set(names: Sequence[str] | None) -> set[str]:
    return set(names or ())


def _names(names: Sequence[str] | None) -> str:
    return ", ".join(sorted(names or ())) or "nothing"
