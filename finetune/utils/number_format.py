"""Formats numbers for people: significant digits without exponent, sizes in MB or GB."""

from __future__ import annotations

import math
from decimal import Decimal

# Below this size, a number written without an exponent is mostly zeros.
_SMALLEST = 1e-7


def significant(value: float, digits: int = 4) -> str:
    """A number with some significant digits; the digits of the integer part are all kept, in groups of three.

    Args:
        value: any float; one that is not finite is written as Python writes it.
        digits: significant digits; trailing zeros behind the point are dropped.

    >>> significant(1e-05), significant(0.79246), significant(130.94), significant(12345.6), significant(2.0)
    ('0.00001', '0.7925', '130.9', '12,346', '2')
    """
    if not math.isfinite(value) or 0 < abs(value) < _SMALLEST:
        return f"{value:.{digits}g}"
    if value == 0:
        return "0"
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    text = f"{round(Decimal(repr(value)), places):,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size_text(size: float) -> str:
    """Bytes as text, in GB or, below one, in MB.

    >>> size_text(16.4e9), size_text(3.94e6)
    ('16.4 GB', '3.94 MB')
    """
    return f"{significant(size / 1e9, 3)} GB" if size >= 1e9 else f"{significant(size / 1e6, 3)} MB"
