"""``python -m finetune doctor``: what is there, what is missing, and the line that mends it."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from finetune.commands import doctor


def test_everything_here_is_looked_at(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert doctor.main(["--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {"python", "torch", "peft", "collective", "shared memory", "disk here", "hub"} <= set(found)
    assert found["collective"]["state"] == "ok"
    assert all(entry["remedy"] for entry in found.values() if entry["state"] != "ok")


def test_what_is_wrong_comes_with_its_remedy(monkeypatch, capsys, tmp_path):
    (tmp_path / "r.txt").write_text("torch>=99\nno-such-package-of-ours>=1  # why\n# a line\n")
    monkeypatch.setattr(doctor, "_REQUIREMENTS", tmp_path / "r.txt")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=64 * 2**20, free=64 * 2**20))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "LOOKS", (doctor.packages, doctor.machine, doctor.compiler))
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert "ERROR   no-such-package-of-ours not installed -> pip install 'no-such-package-of-ours>=1'" in said
    assert "tested: >=99 -> pip install 'torch>=99'" in said
    assert "0.1 GB in /dev/shm -> docker run --shm-size=16g" in said
    assert "no g++" in said
    assert "mend the errors first" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("built", "driver", "state"), [("13.0", True, "error"), (None, True, "error"), ("13.0", False, "warning")]
)
def test_a_gpu_that_torch_does_not_see(monkeypatch, tmp_path, built, driver, state):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Driver/library version mismatch\nexit 18\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if driver else "/nowhere")
    monkeypatch.setattr("torch.version.cuda", built)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = doctor.gpus()
    assert (finding.state, bool(finding.remedy)) == (state, True)
    assert ("version mismatch" in finding.seen) == (driver and built is not None)


def test_two_processes_that_do_not_meet(monkeypatch):
    monkeypatch.setattr(doctor, "_COLLECTIVE", "raise SystemExit('no route')")
    (finding,) = doctor.collective()
    assert (finding.state, finding.seen) == ("error", "gloo: no route")


def test_no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (finding,) = doctor.hub()
    assert (finding.state, "HF_ENDPOINT" in finding.remedy) == ("warning", True)
