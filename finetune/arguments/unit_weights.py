"""``--unit_loss_weights listen=1,speak=1,yield=5``: weights of the decisions of full-duplex records in the loss."""

from __future__ import annotations

import math

from finetune.utils.errors import ArgumentError

FLAG = "--unit_loss_weights"
_NAMES = ("listen", "speak", "yield")
_MOST = 1000


def parse_unit_weights(text: str | None) -> dict[str, float] | None:
    """The weights by name; None without the flag.

    >>> parse_unit_weights("yield=5, speak=2")
    {'yield': 5.0, 'speak': 2.0}

    Raises:
        ArgumentError: not name=number pairs, an unknown name, or a number out of range.
    """
    if text is None:
        return None
    found: dict[str, float] = {}
    for pair in text.split(","):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or name not in _NAMES or name in found:
            raise ArgumentError(
                f"{FLAG} {text}: it is such as listen=1,speak=1,yield=5, each of {', '.join(_NAMES)} at most once"
            )
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not 0 <= found[name] <= _MOST:
            raise ArgumentError(f"{FLAG} {text}: the weight of {name} is {value!r}; it is a number from 0 to {_MOST}")
    return found
