"""Imports at the start of a program: what is hidden is there as soon as something needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "bitsandbytes": "",
    "library": "try:\n    import bitsandbytes\nexcept ImportError:\n    bitsandbytes = None\n",
    "later": "import importlib.util\ndef found(): return importlib.util.find_spec('bitsandbytes') is not None\n",
}
START = "import sys; from finetune.runtime.imports import import_at_start, optional_libraries_hidden; "


def run(folder: Path, code: str) -> str:
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    code = f"sys.path[:0] = [{str(folder)!r}]; {code}"
    done = subprocess.run(
        [sys.executable, "-c", START + code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_an_optional_library_is_hidden_until_it_is_imported(tmp_path):
    code = "import_at_start('library', 'later'); import library, later; "
    shown = "print(library.bitsandbytes, 'bitsandbytes' in sys.modules, later.found()); "
    assert run(tmp_path, code + shown + "import bitsandbytes; print(bitsandbytes.__name__)").splitlines() == [
        "None False True",
        "bitsandbytes",
    ]


@pytest.mark.parametrize(("given", "found"), [("", "False"), ("unless=True", "True")])
def test_what_is_hidden_is_not_found_where_nothing_needs_it(tmp_path, given, found):
    code = f"import_at_start('later'); import later\nwith optional_libraries_hidden({given}): print(later.found())\n"
    assert run(tmp_path, code) == found


@pytest.mark.parametrize("before", ["import bitsandbytes, later", "import later"])
def test_nothing_is_hidden_from_a_program_that_hid_nothing(tmp_path, before):
    assert run(tmp_path, f"{before}\nwith optional_libraries_hidden(): print(later.found())") == "True"


def test_a_named_library_is_hidden_for_a_while(tmp_path):
    code = "import later\nfrom finetune.runtime.imports import libraries_hidden\n"
    code += "with libraries_hidden('bitsandbytes'): print(later.found())\nprint(later.found())\nimport bitsandbytes\n"
    code += "with libraries_hidden('bitsandbytes'): print(bitsandbytes is sys.modules['bitsandbytes'])"
    assert run(tmp_path, code).split() == ["False", "True", "True"]


def test_the_collector_is_as_before(tmp_path):
    code = "import gc; before = gc.get_threshold(); import_at_start('library'); "
    shown = "print(gc.get_threshold() == before, gc.isenabled(), gc.get_freeze_count() > 1000)"
    assert run(tmp_path, code + shown) == "True True True"
