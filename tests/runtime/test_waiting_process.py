"""A process that is forked early and waits for its one command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
# What the command finds is printed by it; the state of the process that gives it is changed after the fork.
PROGRAM = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from finetune.runtime.waiting_process import WaitingProcess
state = []
def run(words):
    if words == ["fail"]:
        raise RuntimeError("broken")
    if words == ["signal"]:
        os.kill(os.getpid(), signal.SIGTERM)
    print(json.dumps([words, os.getcwd(), os.environ.get("GIVEN"), os.environ.get("OWN"), state]))
    return int(words[0]) if words[0].isdigit() else 0
os.environ["OWN"] = "1"
waiting = WaitingProcess(run)
state.append("of the run")
{between}
print("status", waiting.call(json.loads(sys.argv[1]), Path(sys.argv[2]), {{"GIVEN": "2"}}))
"""


def called(words: list[str], folder: Path, between: str = "") -> subprocess.CompletedProcess[str]:
    code = PROGRAM.format(between=between)
    command = [sys.executable, "-c", code, json.dumps(words), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)


def test_the_command_has_its_folder_and_environment_and_nothing_of_the_run(tmp_path):
    found, status = called(["7", "a b"], tmp_path).stdout.splitlines()
    assert json.loads(found) == [["7", "a b"], str(tmp_path), "2", None, []]
    assert status == "status 7"


def test_an_error_of_the_command_is_a_failure_with_its_traceback(tmp_path):
    done = called(["fail"], tmp_path)
    assert done.stdout == "status 1\n"
    assert "RuntimeError: broken" in done.stderr


def test_a_signal_is_told_as_a_shell_tells_it(tmp_path):
    assert called(["signal"], tmp_path).stdout == f"status {128 + signal.SIGTERM}\n"


@pytest.mark.parametrize(
    "between",
    [
        "os.killpg(0, signal.SIGINT) if signal.signal(signal.SIGINT, signal.SIG_IGN) else None",
        "child = os.fork() or (time.sleep(60), os._exit(0))",
    ],
    ids=["ctrl-c before the command", "another process has the other side open"],
)
def test_it_waits_and_answers_whatever_comes_between(tmp_path, between):
    code = PROGRAM.format(between=between) + "\nif 'child' in globals(): os.kill(child, signal.SIGKILL)"
    command = [sys.executable, "-c", code, '["0"]', str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True, start_new_session=True
    )
    assert done.stdout.splitlines()[-1] == "status 0"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_process_that_never_gave_a_command(end):
    code = PROGRAM.format(between="print(waiting._process, flush=True); time.sleep(60)")
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    with run, run.stdout as out:
        waiting = int(out.readline())
        assert psutil.pid_exists(waiting)
        os.kill(run.pid, end)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(waiting) and psutil.Process(waiting).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
