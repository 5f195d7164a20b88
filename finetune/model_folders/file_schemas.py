"""Schemas of the JSON files in model and adapter folders: one table per file, key to allowed values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.utils.errors import CheckpointError
from finetune.utils.json_objects import shown


@dataclass(frozen=True, slots=True)
class Kind:
    """Allowed values of a key.

    Attributes:
        description: for messages.
        fits: whether a value is allowed.
        null: whether null is allowed, as for a missing key.
    """

    description: str
    fits: Callable[[Any], bool]
    null: bool = True


Table = Mapping[str, Kind]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**31


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


# Those of published checkpoints: known without the module of transformers, which takes two seconds to import.
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


def _activation(value: Any) -> bool:
    if value in _ACTIVATIONS:
        return True
    from transformers.activations import ACT2FN

    return isinstance(value, str) and value in ACT2FN


def _rope(value: Any) -> bool:
    if not isinstance(value, dict) or (value.get("rope_type") or value.get("type") or "default") not in _ROPES:
        return False
    return all(kind.fits(value[key]) for key, kind in _ROPE_KEYS.items() if key in value)


_ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "su", "llama3", "proportional", "mrope")
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")

COUNT = Kind("a whole number of at least 1", _integer(1))
NATURAL = Kind("a whole number of at least 0", _integer(0))
POSITIVE = Kind("a number above 0", lambda value: _number(value) and value > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda value: _number(value) and value >= 0)
SHARE = Kind("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
SMALL = Kind("a number above 0 and up to 1", lambda value: _number(value) and 0 < value <= 1)
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", _text)
OBJECT = Kind("an object {...}", lambda value: isinstance(value, dict))
TEXTS = Kind("a list of texts", _list_of(_text))
COLOURS = Kind("a list of three numbers", lambda value: _list_of(_number)(value) and len(value) == 3)
SPREADS = Kind(
    "a list of three numbers above 0",
    lambda value: _list_of(_number)(value) and len(value) == 3 and min(value) > 0,
)
SIDES = Kind(
    "a list of two whole numbers of at least 1", lambda value: _list_of(_integer(1))(value) and len(value) == 2
)
ACTIVATION = Kind("the name of an activation function of transformers", _activation)
VERSION = Kind("a text or a number", lambda value: _text(value) or _number(value))
DTYPE = Kind(f"one of {', '.join(_DTYPES)}", lambda value: isinstance(value, str) and value in _DTYPES)
_ROPE_KEYS = {
    "partial_rotary_factor": SMALL,
    **dict.fromkeys(("rope_theta", "factor"), POSITIVE),
    "mrope_section": Kind("three sizes", lambda value: _list_of(_integer(1))(value) and len(value) == 3),
}
ROPE = Kind(f"an object whose rope_type is one of {', '.join(_ROPES)}, with its numbers in their ranges", _rope)
IDS = Kind("a token id or a list of them", lambda value: _integer(0)(value) or _ids(value))
TOKEN = Kind("a text or an object {...} with its content", lambda value: isinstance(value, str) or _is_token(value))


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _ids(value: Any) -> bool:
    return _list_of(_integer(0))(value) and value != []


def _templates(value: Any) -> bool:
    parts = ("name", "template")
    each = _list_of(lambda item: isinstance(item, dict) and all(isinstance(item.get(key), str) for key in parts))
    return isinstance(value, str) or (each(value) and value != [])


def _added(value: Any) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() and _is_token(token) for key, token in value.items())


_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SIZES = (
    *("intermediate_size", "num_key_value_heads", "max_position_embeddings", "head_dim", "patch_size", "image_size"),
    *("query_num", "scale_resolution", "max_slice_nums", "num_channels", "linear_conv_kernel_dim"),
    *("linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim"),
    *("full_attention_interval", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "audio_pool_step"),
    *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins"),
    *("merger_times", "max_source_positions", "shared_expert_intermediate_size", "dim_model_base"),
)
_PARTS = ("text_config", "vision_config", "audio_config", "slice_config")

CONFIG: Table = {
    **dict.fromkeys(_NEEDED, replace(COUNT, null=False)),
    **dict.fromkeys(_SIZES, COUNT),
    **dict.fromkeys(("rope_theta", "scale_emb", "scale_depth"), POSITIVE),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps"), SMALL),
    "initializer_range": SMALL,
    "attention_dropout": SHARE,
    **dict.fromkeys(("slice_mode", "tie_word_embeddings", "use_image_id", "drop_vision_last_layer"), TRUTH),
    **dict.fromkeys(("attention_bias", "use_cache", "batch_vision_input"), TRUTH),
    **dict.fromkeys(("model_type", "vision_encoder"), TEXT),
    **dict.fromkeys(("hidden_act", "activation_function"), ACTIVATION),
    **dict.fromkeys(("merge_kernel_size", "window_kernel_size"), SIDES),
    **dict.fromkeys(("image_token_id", "video_token_id", "insert_layer_id"), replace(NATURAL, null=False)),
    "version": VERSION,
    "architectures": TEXTS,
    **dict.fromkeys(("torch_dtype", "dtype"), DTYPE),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ROPE),
    **dict.fromkeys(_PARTS, OBJECT),
    "vision_config": replace(OBJECT, null=False),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS),
}
"""config.json and its sections for the parts of the model."""

PROCESSOR: Table = {
    **dict.fromkeys(("max_slice_nums", "scale_resolution", "patch_size", "image_feature_size"), COUNT),
    **dict.fromkeys(("feature_size", "hop_length", "n_fft", "chunk_length", "sampling_rate", "max_num_frames"), COUNT),
    "audio_pool_step": COUNT,
    "stack_frames": replace(COUNT, null=False),
    **dict.fromkeys(("slice_mode", "use_image_id", "do_resize", "do_rescale", "do_normalize"), TRUTH),
    **dict.fromkeys(("norm_mean", "image_mean"), COLOURS),
    **dict.fromkeys(("norm_std", "image_std"), SPREADS),
    "rescale_factor": POSITIVE,
    "small_image_upsize": TEXT,
    **dict.fromkeys(("image_processor", "video_processor", "audio_processor", "feature_extractor"), OBJECT),
}
"""processor_config.json, its sections, and the files of single processors."""

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOKENIZER_CONFIG: Table = {
    **dict.fromkeys(_TOKENS, TOKEN),
    "tokenizer_class": TEXT,
    "chat_template": Kind("a text, or a list of objects with name and template", _templates),
    "added_tokens_decoder": Kind("an object from ids to tokens with their content", _added),
    "model_max_length": POSITIVE,
    **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"), TRUTH),
}
TOKENIZER: Table = {
    "model": replace(OBJECT, null=False),
    "added_tokens": Kind("a list of objects with their content", _list_of(_is_token)),
}
SPECIAL_TOKENS: Table = dict.fromkeys(_TOKENS, TOKEN)
GENERATION: Table = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), IDS),
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), COUNT),
    **dict.fromkeys(("top_k", "min_new_tokens", "min_length"), NATURAL),
    "temperature": NOT_NEGATIVE,
    "top_p": SHARE,
    "repetition_penalty": POSITIVE,
    **dict.fromkeys(("do_sample", "use_cache"), TRUTH),
}

_COUNTS = Kind(
    "an object from patterns to whole numbers of at least 1",
    lambda value: isinstance(value, dict) and all(map(_integer(1), value.values())) and all(map(_pattern, value)),
)
_SCALES = Kind(
    "an object from patterns to numbers above 0",
    lambda value: isinstance(value, dict) and all(map(POSITIVE.fits, value.values())) and all(map(_pattern, value)),
)
_TARGETS = Kind(
    "a regular expression or a list of names",
    lambda value: _pattern(value) if isinstance(value, str) else _list_of(_text)(value) and bool(value),
)
_NAMES = Kind("a list of names", _list_of(_text))
_LAYERS = Kind("a layer number or a list of them", IDS.fits)
_PAIRS = Kind("a list of pairs of layer numbers", _list_of(lambda pair: _list_of(_integer(0))(pair) and len(pair) == 2))

ADAPTER: Table = {
    "peft_type": Kind('"LORA", the one kind of adapter that is supported', lambda value: value == "LORA", null=False),
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "r": replace(COUNT, null=False),
    "lora_alpha": replace(POSITIVE, null=False),
    "lora_dropout": SHARE,
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "target_parameters": _NAMES,
    "modules_to_save": _NAMES,
    "rank_pattern": _COUNTS,
    "alpha_pattern": _SCALES,
    "bias": Kind("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    "layers_to_transform": _LAYERS,
    "layers_pattern": Kind("a name or a list of names", lambda value: _text(value) or _list_of(_text)(value)),
    "layer_replication": _PAIRS,
    "auto_mapping": OBJECT,
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"), TRUTH),
    "init_lora_weights": Kind("true, false or a text", lambda value: isinstance(value, (bool, str))),
}


def check(values: Mapping[str, Any], table: Table, where: str) -> None:
    """Checks the keys of a file that are in the table.

    Args:
        values: the file, or a section of it.
        table: one of the tables above.
        where: file and section, for the message.

    Raises:
        CheckpointError: naming the first invalid key, its value and the allowed values.
    """
    for key, kind in table.items():
        if key not in values:
            continue
        value = values[key]
        if (not kind.null) if value is None else (not kind.fits(value)):
            raise CheckpointError(
                f"{where}: {key} is {shown(value)}; it should be {kind.description}: correct it, or download it again"
            )


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Checks config.json: its keys, those of its sections, and that numbers of heads are divisors.

    Raises:
        CheckpointError: as ``check``.
    """
    for part, values in _with_parts(config):
        place = f"{where}, {part}" if part else where
        check(values, CONFIG, place)
        heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
        width = values.get("hidden_size")
        if heads and width and not values.get("head_dim") and width % heads:
            raise CheckpointError(
                f"{place}: hidden_size {width} cannot be divided among num_attention_heads {heads}: correct one of "
                "them, or download the file again"
            )
        if heads and shared and heads % shared:
            raise CheckpointError(
                f"{place}: num_attention_heads {heads} is no multiple of num_key_value_heads {shared}: correct one of "
                "them, or download the file again"
            )
    tower = config.get("vision_config") or {}
    if (after := config.get("insert_layer_id")) is not None and after >= tower.get("num_hidden_layers", after + 1):
        raise CheckpointError(
            f"{where}: insert_layer_id is {after}, but vision_config has {tower['num_hidden_layers']} layers: correct "
            "one of them, or download the file again"
        )


def _with_parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", config
    for part in _PARTS:
        if isinstance(config.get(part), dict):
            yield part, config[part]
