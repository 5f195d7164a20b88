"""The examples in the docstrings of the encoder, the data set and the collators run and print what they say."""

from __future__ import annotations

import doctest

import pytest

import dataset
from finetune.encoding import encoder


@pytest.mark.parametrize(("module", "lines"), [(encoder, 12), (dataset, 18)])
def test_docstring_examples(module, lines: int) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= lines
    assert result.failed == 0
