"""README.md of a full result says what keeps its copied code files from running with the installed torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.model_card import code_note
from finetune.checkpoints.saving import finish_full
from finetune.commands.export import main as export

USES = "def shapes() -> List[int]:\n    return []\n"
CODE = {
    "broken": (f"from torch.nn.functional import *\n{USES}", True),
    "whole": (f"from functools import partial\nfrom typing import Optional, List\n{USES}", False),
    "without": ("from typing import Optional\n# no List here\n", False),
}


@pytest.mark.parametrize(("code", "noted"), CODE.values(), ids=CODE)
def test_a_full_result_says_what_its_code_lacks(tiny, tmp_path: Path, capsys, code: str, noted: bool) -> None:
    base = shutil.copytree(tiny("v2_6"), tmp_path / "base")
    assert code_note(base) is None
    (base / "resampler.py").write_text(code)
    result = shutil.copytree(tiny("v2_6"), tmp_path / "result")
    finish_full(result, resolve_base(str(base)))
    words = ["--model_name_or_path", str(base), "--export_dir", str(tmp_path / "out"), "--export_device", "cpu"]
    assert export(words) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert len(said) == noted
    for folder in (result, tmp_path / "out"):
        assert (folder / "resampler.py").read_text() == code, "published files stay"
        assert ("put `from typing import List` at the top" in (folder / "README.md").read_text()) == noted
        assert (code_note(folder) is not None) == noted
