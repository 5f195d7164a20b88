"""What is left of a run's reference once its result was checked."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest

from finetune.tuning.verification import verify_in_fresh_process


@pytest.mark.parametrize(("status", "kept"), [(0, False), (3, True)])
def test_the_reference_stays_only_for_another_check(tmp_path, monkeypatch, caplog, status, kept):
    def checked(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert Path(command[-1]).is_file()
        return subprocess.CompletedProcess(command, status)

    reference = tmp_path / "verify-1" / "reference.safetensors"
    reference.parent.mkdir()
    reference.write_bytes(b"logits")
    monkeypatch.setattr(subprocess, "run", checked)
    with caplog.at_level(logging.ERROR):
        assert verify_in_fresh_process(tmp_path / "a result", reference) == status
    assert reference.parent.exists() == kept
    assert (f"finetune verify '{tmp_path}/a result' --reference {reference}" in caplog.text) == kept
