"""What every command answers to a malformed input: one line that begins with "error: ", and status 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command of ``python -m finetune`` in this process; gives its one line."""
    from finetune.__main__ import main

    def run(*words: str) -> str:
        assert main(list(words)) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert "Traceback" not in "".join(lines)
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert lines[-1].startswith("error: ")
        return lines[-1]

    return run


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of one good record."""
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    path = tmp_path_factory.mktemp("records") / "data.json"
    path.write_text(json.dumps([{"id": "0", "conversations": talk}]), encoding="utf-8")
    return path
