"""The KV cache under the argument name of the installed transformers.

Up to transformers 5.23 arguments and outputs call it ``past_key_values``, from 5.24 on ``cache``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

NAMES = ("cache", "past_key_values")
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in NAMES)


def as_installed(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Any]:
    """The cache given under either name, as a keyword argument of the installed transformers.

    Raises:
        ValueError: both names were used.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument, but both were given")
    return {CACHE: past_key_values if cache is None else cache}


def cache_of(output: Any) -> dict[str, Any]:
    """The cache in an output of transformers, as a keyword argument of another; None where there is none."""
    return {CACHE: getattr(output, CACHE, None)}
