"""The launcher: exit codes of the run, cleanup of temporary files and processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from finetune.runtime import outcome
from finetune.runtime.processes import PROCESSES

ROOT = Path(__file__).resolve().parent.parent
# A rank that does not import torch, so that it starts at once.
RANK = """
import os, pathlib, sys, tempfile, time
from finetune.runtime import outcome
outcome.install_exit_handlers()
rank = os.environ["RANK"]
(pathlib.Path(tempfile.gettempdir()) / ("left-by-" + rank)).touch()
{body}
"""
SAVES = """
outcome.watch.can_save(20, lambda: False)
print("ready", flush=True)
while outcome.watch.request is None: time.sleep(0.01)
outcome.watch.saved()
outcome.report("stopped", exit_code=outcome.STOPPED)
outcome.exit_after_handlers(outcome.STOPPED)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short path, so that the launcher can have temporary files below it."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def start(folder: Path, body: str, name: str = "rank.py", python: str = sys.executable) -> subprocess.Popen[str]:
    script = folder / name
    script.write_text(RANK.format(body=body))
    # With --help the flags of a finetune.py are not looked at.
    words = ["--nproc_per_node", "2", "--standalone", "--", str(script), "--help"]
    return subprocess.Popen(
        [python, "-m", "finetune.launch", *words],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=-1,
        stderr=-1,
        text=True,
    )


def left(folder: Path) -> list[str]:
    """What a run left there, besides its script and the cache of compiled kernels, which all runs share."""
    return [
        path.name for path in folder.iterdir() if path.suffix != ".py" and not path.name.startswith("torchinductor_")
    ]


ENDS = [
    ("outcome.exit_after_handlers(5)", 5, ""),
    ("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)", 137, "rank 1 (process"),
]


# Ranks of a finetune.py are forked from the launcher; other scripts are started.
SCRIPTS = ("rank.py", "finetune.py")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(("body", "status", "said"), ENDS)
def test_status(folder, body, status, said, name, forked_python):
    process = start(folder, body, name, forked_python)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert said in err
    assert "Traceback" not in err
    assert left(folder) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_error_that_nobody_expects(folder, name, forked_python):
    """It has its traceback and a result line, and nobody else's beside it."""
    process = start(
        folder, "with outcome.ReportedErrors(): (1 / 0 if rank == '0' else time.sleep(60))", name, forked_python
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == outcome.FAILED, err
    assert json.loads(out.removeprefix("result="))["message"] == "ZeroDivisionError: division by zero"
    assert err.count("Traceback") == 1
    assert left(folder) == []


def test_interrupted_while_it_imports(folder):
    """Ctrl-C before there are ranks is no traceback."""
    process = start(folder, "", "finetune.py")
    imports = psutil.Process(process.pid)
    while not any("torch" in mapped.path for mapped in imports.memory_maps()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == outcome.INTERRUPTED, err
    assert json.loads(out.removeprefix("result="))["status"] == "interrupted"
    assert err == "interrupted before training started\n"
    assert left(folder) == []


def test_forked_ranks_import_nothing_again(folder):
    """They find what training needs, as the launcher has it, in a process that is not the launcher's program."""
    body = "print('trainer' in sys.modules, __name__, sys.argv[1:], [bool(os.getppid() in (0, 1))], flush=True)"
    process = start(folder, body, "finetune.py")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines() == ["True __main__ ['--help'] [False]"] * 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signal_is_passed_on_and_ranks_may_save(folder, name):
    process = start(folder, SAVES, name)
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == ["ready\n"] * 2
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == outcome.STOPPED, err
    assert json.loads(out.removeprefix("result="))["status"] == "stopped"
    assert left(folder) == []


def test_killed_as_a_whole(folder, monkeypatch):
    """The ranks end with it; the next start removes what it left, and nothing that is not of a dead run of ours."""
    process = start(folder, 'print("ready", flush=True); time.sleep(60)')
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == ["ready\n"] * 2
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []
    (own,) = (path for path in folder.iterdir() if path.is_dir())
    assert {path.name for path in (own / PROCESSES).iterdir()} == {str(rank.pid) for rank in ranks}
    tensor = Path(f"/dev/shm/torch_{ranks[0].pid}_{time.time_ns()}_0")
    foreign = Path(f"/dev/shm/torch_{os.getpid()}_{time.time_ns()}_0")
    other = folder / "finetune-run-of-somebody-else"
    other.mkdir()
    for path in (tensor, foreign):
        path.touch()
    try:
        second = start(folder, "outcome.exit_after_handlers(0)")
        second.communicate(timeout=60)
        assert second.returncode == 0
        assert left(folder) == [other.name]
        assert not tensor.exists()
        assert foreign.exists()
    finally:
        tensor.unlink(missing_ok=True)
        foreign.unlink(missing_ok=True)
