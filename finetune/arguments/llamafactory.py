"""Translates LLaMA-Factory's YAML keys to our flags, by the table in llamafactory.yaml and the rules here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from finetune.arguments.argv import parse_bool
from finetune.arguments.flag_names import own_flags
from finetune.arguments.llamafactory_table import KeyRow, default_values, other_defaults, rows
from finetune.utils.errors import ArgumentError

logger = logging.getLogger(__name__)

# Keys that are translated together.
_METHOD = ("finetuning_type", "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
_PREFERENCE = ("stage", "pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing", "simpo_gamma")
_LOSS_OF = {"dpo_label_smoothing": "sigmoid", "simpo_gamma": "simpo"}
"""Keys that one loss alone reads."""
_ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2"}


class Given(NamedTuple):
    """Values of a key or flag, and where they were given.

    Attributes:
        values: as on a command line.
        layer: precedence; a higher layer overrides a lower one.
        origin: for messages and run.yaml, e.g. "x.yaml: lora_rank".
    """

    values: list[str]
    layer: int
    origin: str


Keys = Mapping[str, Given]
Flags = dict[str, Given]


def is_llamafactory_file(keys: Collection[str], flags: set[str]) -> bool:
    """Whether a file has a key of LLaMA-Factory that is no flag of ours, or ``stage`` and none that is ours alone."""
    if any(key in rows() and key not in flags for key in keys):
        return True
    return "stage" in keys and not any(key in own_flags() and key not in rows() for key in keys)


def defaults(given: Keys, command: str) -> Flags:
    """LLaMA-Factory's defaults of the keys that a file does not set, as keys of layer 0."""
    method = _value(given, "finetuning_type", "lora")
    known: Flags = {}
    for row in rows().values():
        value = default_values(row.default)
        counts = row.export if command == "export" else not row.only_export
        if value is None or row.key in given or not counts or (row.flag is None and row.rule is None):
            continue
        if row.ours is not None:
            logger.info("%s is not set: %s (%s there)", row.key, row.ours, row.default)
        elif row.method in (None, method):
            known[row.key] = Given(value, 0, f"LLaMA-Factory's default of {row.key}")
    return known


def training_defaults() -> Flags:
    """The flags of transformers for which LLaMA-Factory has another default."""
    values = {key: default_values(value) or [] for key, value in other_defaults().items()}
    return {key: Given(value, 0, "LLaMA-Factory's default") for key, value in values.items()}


def translate(keys: Keys, command: str) -> Flags:
    """Our flags for some of LLaMA-Factory's keys.

    Args:
        keys: the keys, including defaults.
        command: "train" or "export".

    Raises:
        ArgumentError: an unsupported value.
    """
    flags: Flags = {}
    keys = {key: given for key, given in keys.items() if _counts(rows()[key], command)}
    for key, given in keys.items():
        row = rows()[key]
        if row.flag is not None:
            flags[row.flag] = given
        elif row.rule is None:
            _check(row, given)
    if command != "export" and "finetuning_type" not in keys:
        flags.update(_single_switches(keys))
    for key, rule in _RULES.items():
        if key in keys:
            flags.update(rule(keys, command))
    return flags


def _counts(row: KeyRow, command: str) -> bool:
    """Whether a command reads a key; logs a warning if it does not."""
    if command == "export":
        if not (row.export or row.only_export):
            logger.warning("%s has no effect in export", row.key)
            return False
    elif row.only_export:
        logger.warning("%s has no effect in training; `python -m finetune export` reads it", row.key)
        return False
    return True


def _check(row: KeyRow, given: Given) -> None:
    if row.is_default(given.values):
        return
    if row.instead is not None:
        raise ArgumentError(f"{given.origin} {' '.join(given.values)} is not part of this tool: {row.instead}")
    logger.warning("%s %s has no effect: %s", given.origin, " ".join(given.values), row.no_effect)


def _value(keys: Keys, key: str, otherwise: str) -> str:
    return ",".join(keys[key].values) if key in keys else otherwise


def _truth(keys: Keys, key: str) -> bool:
    return parse_bool(key, _value(keys, key, str(rows()[key].default)))


def _method(keys: Keys, command: str) -> Flags:
    """finetuning_type and the freeze_* keys: what is trained per part."""
    if command == "export":
        return {}
    given = keys["finetuning_type"]
    kind = given.values[0].lower()
    vision, resampler = not _truth(keys, "freeze_vision_tower"), not _truth(keys, "freeze_multi_modal_projector")
    language = not _truth(keys, "freeze_language_model")
    if kind not in ("lora", "full", "freeze"):
        raise ArgumentError(f"{given.origin} {kind} is not part of this tool: lora, full and freeze are")
    layer, source = _latest(keys, _METHOD)

    def flag(*values: str) -> Given:
        return Given(list(values), layer, source)

    def switch(on: bool) -> Given:
        return flag(str(on).lower())

    if kind == "lora":
        parts = [part for part, adapted in (("llm", language), ("vision", vision)) if adapted]
        if not parts:
            raise ArgumentError("freeze_language_model and freeze_vision_tower: no part is left for adapters")
        return {
            "use_lora": switch(True),
            "tune_llm": switch(False),
            "tune_vision": switch(False),
            "tune_resampler": switch(resampler),
            "lora_parts": flag(*parts),
        }
    flags = {
        "use_lora": switch(False),
        "tune_llm": switch(language),
        "tune_vision": switch(vision),
        "tune_resampler": switch(resampler),
    }
    if kind == "freeze":
        layers = _value(keys, "freeze_trainable_layers", "2")
        flags["tune_llm_layers"] = Given([layers], layer, source)
    return flags


def _single_switches(keys: Keys) -> Flags:
    """The freeze_* keys without finetuning_type, together with our own flags."""
    pairs = {"freeze_vision_tower": "tune_vision", "freeze_multi_modal_projector": "tune_resampler"}
    pairs["freeze_language_model"] = "tune_llm"
    flags = {
        ours: keys[theirs]._replace(values=[str(not _truth(keys, theirs)).lower()])
        for theirs, ours in pairs.items()
        if theirs in keys
    }
    if "freeze_trainable_layers" in keys:
        flags["tune_llm_layers"] = keys["freeze_trainable_layers"]
    return flags


def _latest(keys: Keys, names: tuple[str, ...]) -> tuple[int, str]:
    """The highest layer in which one of some keys is given, and its origin."""
    found = max((keys[name] for name in names if name in keys), key=lambda given: given.layer)
    return found.layer, found.origin


def _adapter(keys: Keys, command: str) -> Flags:
    given = keys["adapter_name_or_path"]
    if command == "export":
        return {"adapter_name_or_path": given}
    if "," in given.values[0]:
        raise ArgumentError(
            f"{given.origin} names several adapters: merge the first ones with `python -m finetune export` and "
            "continue from the last"
        )
    return {"lora_weight_path": given}


def _attention(keys: Keys, command: str) -> Flags:
    given = keys["flash_attn"]
    name = given.values[0].lower()
    if name not in _ATTENTION:
        known = ", ".join(_ATTENTION)
        raise ArgumentError(f"{given.origin} {name} is not part of this tool: {known} are")
    chosen = _ATTENTION[name]
    return {} if chosen is None else {"attn_implementation": given._replace(values=[chosen])}


def _checkpointing(keys: Keys, command: str) -> Flags:
    """In LLaMA-Factory gradient checkpointing is on by default."""
    on = not _truth(keys, "disable_gradient_checkpointing")
    return {"gradient_checkpointing": keys["disable_gradient_checkpointing"]._replace(values=[str(on).lower()])}


def _alpha(keys: Keys, command: str) -> Flags:
    given = keys["lora_alpha"]
    if given.values[0] == rows()["lora_alpha"].default:
        rank = _value(keys, "lora_rank", str(rows()["lora_rank"].default))
        given = given._replace(values=[str(2 * int(rank))])
    return {"lora_alpha": given}


def _targets(keys: Keys, command: str) -> Flags:
    given = keys["lora_target"]
    names = [name.strip() for value in given.values for name in value.split(",") if name.strip()]
    return {"lora_target_modules": given._replace(values=["all-linear" if names == ["all"] else ",".join(names)])}


def _quantization(keys: Keys, command: str) -> Flags:
    given = keys["quantization_bit"]
    if given.values != ["4"]:
        raise ArgumentError(f"{given.origin} {given.values[0]} is not part of this tool: 4 bit is")
    return {"q_lora": given._replace(values=["true"])}


def _history(keys: Keys, command: str) -> Flags:
    last = _truth(keys, "mask_history")
    return {"train_on": keys["mask_history"]._replace(values=["last" if last else "all"])}


def _neat_packing(keys: Keys, command: str) -> Flags:
    """neat_packing and packing are the same here: samples of a packed row never attend to each other."""
    on = _truth(keys, "neat_packing")
    return {"packing": keys["neat_packing"]._replace(values=["best_fit"])} if on else {}


def _shuffling(keys: Keys, command: str) -> Flags:
    off = _truth(keys, "disable_shuffling")
    return {"train_sampling_strategy": keys["disable_shuffling"]._replace(values=["sequential" if off else "random"])}


def _preference(keys: Keys, command: str) -> Flags:
    """The stage and the keys of preference training; defaults that would have no effect are not passed on."""
    if command == "export":
        return {}
    stage, loss = _value(keys, "stage", "sft").lower(), _value(keys, "pref_loss", "sigmoid")
    if stage not in ("sft", "dpo"):
        raise ArgumentError(
            f"{keys['stage'].origin} {stage} is not part of this tool: sft (supervised) and dpo (preference pairs) are"
        )
    flags = {"stage": keys["stage"]} if "stage" in keys else {}
    for name in _PREFERENCE[1:]:
        if name not in keys:
            continue
        only = _LOSS_OF.get(name, loss)
        if keys[name].layer > 0 or (stage == "dpo" and loss == only):
            row = rows()[name]
            unused = stage == "sft" or loss != only
            if not (unused and row.is_default(keys[name].values)):
                flags[name] = keys[name]
    return flags


_RULES: dict[str, Callable[[Keys, str], Flags]] = {
    "finetuning_type": _method,
    "adapter_name_or_path": _adapter,
    "flash_attn": _attention,
    "disable_gradient_checkpointing": _checkpointing,
    "lora_alpha": _alpha,
    "lora_target": _targets,
    "quantization_bit": _quantization,
    "mask_history": _history,
    "disable_shuffling": _shuffling,
    "neat_packing": _neat_packing,
    "stage": _preference,
}
