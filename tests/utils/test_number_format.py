"""Numbers in messages: significant digits, no exponent."""

from __future__ import annotations

import pytest

from finetune.utils.number_format import significant


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1e-05, "0.00001"),
        (2.5e-06, "0.0000025"),
        (0.79246, "0.7925"),
        (130.94, "130.9"),
        (0.99999, "1"),
        (2.0, "2"),
        (1234.56, "1,235"),
        (12345.6, "12,346"),
        (-0.00015, "-0.00015"),
        (3e-12, "3e-12"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_four_significant_digits(value, text):
    assert significant(value) == text


def test_other_numbers_of_digits():
    assert significant(0.123456789, 6) == "0.123457"
    assert significant(0.00123, 1) == "0.001"
