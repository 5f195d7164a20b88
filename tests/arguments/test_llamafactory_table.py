"""The table of LLaMA-Factory's keys: complete, with their defaults, and in sync with docs/llamafactory.md."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from finetune.arguments.flag_names import takes_many
from finetune.arguments.llamafactory import Given, translate
from finetune.arguments.llamafactory_table import default_values, rows
from finetune.commands.export import expand_yaml
from finetune.utils.errors import ArgumentError
from tools import llamafactory_doc

ROOT = Path(__file__).resolve().parents[2]
# Names and defaults of its parameters, read from its own declarations.
THEIRS = json.loads((ROOT / "tests" / "golden" / "llamafactory_keys.json").read_text())


@pytest.mark.parametrize("key", THEIRS)
def test_every_key_of_theirs_has_a_row_with_its_default(key):
    if key == "lora_alpha":  # null there, and then twice the rank
        assert rows()[key].default == "2 x lora_rank"
    else:
        assert rows()[key].default == THEIRS[key]


@pytest.mark.parametrize("row", rows().values(), ids=lambda row: row.key)
def test_every_row_says_one_thing(row):
    fates = [row.flag, row.rule, row.no_effect, row.instead]
    assert sum(fate is not None for fate in fates) == 1
    if row.flag is not None:
        words = [f"--{row.flag}", "false" if row.default is False else "1"]
        assert row.only_export or row.flag in takes_many()
        assert not (row.export or row.only_export) or expand_yaml(words) == words


@pytest.mark.parametrize("row", [row for row in rows().values() if row.instead or row.no_effect], ids=lambda r: r.key)
def test_defaults_pass_in_silence_and_others_are_told(row, caplog):
    command = "export" if row.only_export else "train"
    for words in (default_values(row.default), ["false"] if row.default is None else None):
        if words is not None:
            assert translate({row.key: Given(words, 1, "x")}, command) == {}
            assert not caplog.records
    caplog.set_level(logging.WARNING)
    other = {row.key: Given(["something"], 1, f"x: {row.key}")}
    if row.instead is not None:
        with pytest.raises(ArgumentError, match=row.key) as refused:
            translate(other, command)
        assert row.instead in str(refused.value)
    else:
        assert translate(other, command) == {}
        assert row.no_effect in caplog.text


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "llamafactory.md").read_text(encoding="utf-8")
    assert page == llamafactory_doc.insert(page), "run: python -m tools.llamafactory_doc docs/llamafactory.md"
    assert all(f"| `{key}` |" in page for key in THEIRS)
