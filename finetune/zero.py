"""DeepSpeed's own reading of a configuration, before a run begins."""

from __future__ import annotations

from typing import Any

from finetune.errors import ArgumentError


def check_zero(config: Any) -> None:
    """Checks the block ``zero_optimization`` as DeepSpeed will; once the environment says on which device it runs.

    Args:
        config: of ``config.deepspeed.load_deepspeed``.

    Raises:
        ArgumentError: a key that DeepSpeed does not have, or a value of another type.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ArgumentError(f"--deepspeed: zero_optimization, {key} {first['input']!r}: {first['msg']}") from error
