"""Exit codes and the result line, for every way in which a process can end."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.runtime import outcome
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SLEEP = """
import hashlib, time
from finetune.runtime import outcome
outcome.install_exit_handlers()
print("ready", flush=True)
{wait}
"""
# The second waits in C, as a process whose peer died does inside a collective.
WAITS = ("time.sleep(30)", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)")


def last(text: str) -> dict:
    line = text.splitlines()[-1]
    assert line.startswith("result=")
    return json.loads(line.removeprefix("result="))


@pytest.mark.parametrize(
    ("number", "wait"), [(signal.SIGINT, WAITS[0]), (signal.SIGTERM, WAITS[0]), (signal.SIGTERM, WAITS[1])]
)
def test_interrupted(number, wait):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEP.format(wait=wait)],
        cwd=ROOT,
        env={**os.environ, "RANK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell has SIGINT ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == outcome.INTERRUPTED == 130
    assert len(err.splitlines()) == 1, err
    assert "--resume_from_checkpoint auto" in err
    assert last(out)["status"] == "interrupted"


def test_a_crash_keeps_its_traceback():
    code = (
        "from finetune.runtime import outcome; outcome.install_exit_handlers(); raise RuntimeError('broken: \\u00fc')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == outcome.FAILED == 1
    assert "Traceback" in done.stderr
    assert last(done.stdout) == {"status": "error", "exit_code": 1, "message": "RuntimeError: broken: ü"}


LEAVE = """
from finetune.runtime import outcome
import atexit, os, sys, threading, time
class Late:
    def __del__(self):
        os.write(1, b"taken apart\\n")
late = Late()
atexit.register(print, "exit handler")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
{last}
"""


@pytest.mark.parametrize(
    ("last", "status", "ends"),
    [
        ("outcome.exit_after_handlers(3)", 3, []),
        ("outcome.install_exit_handlers(); raise RuntimeError('broken')", 1, []),
        ("sys.exit(3)", 3, ["taken apart"]),
    ],
)
def test_leaving_waits_for_threads_and_runs_exit_handlers_and_takes_nothing_apart(last, status, ends):
    command = [sys.executable, "-c", LEAVE.format(last=last)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if not line.startswith("result=")]
    assert (done.returncode, said) == (status, ["thread", "exit handler", *ends]), done.stderr


@pytest.mark.parametrize("program", ["finetune.py", "finetune/__main__.py"])
def test_the_way_out_is_there_before_torch(program):
    """Exit handlers run in reverse order: those of torch come before ours only if torch is imported after it."""
    imports = [node for node in ast.parse((ROOT / program).read_text()).body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").partition(".")[0] not in sys.stdlib_module_names]
    ours = [node for node in ours if node.module != "finetune.commands.command_list"]  # a table that imports nothing
    assert ours[0].module == "finetune.runtime"
    assert "outcome" in [alias.name for alias in ours[0].names]
    heavy = "import sys, finetune.runtime.outcome; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, check=True)


def test_a_data_error_has_its_last_line(forked_python):
    done = subprocess.run(
        [forked_python, str(ROOT / "finetune.py"), "--model_name_or_path", "no/such/folder", "--data_path", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == outcome.USER_ERROR == 2
    assert done.stderr.splitlines()[-1].startswith("error: no/such/folder")
    assert last(done.stdout)["exit_code"] == 2


def test_report(capsys, monkeypatch):
    outcome.report("ok", train_loss=float("nan"), eval_loss=1.5)
    assert capsys.readouterr().out == 'result={"status": "ok", "train_loss": null, "eval_loss": 1.5}\n'
    monkeypatch.setenv("RANK", "1")
    outcome.report("ok")
    assert capsys.readouterr().out == ""


def test_messages_of_loader_processes_lose_their_traceback():
    text = "Caught DataError in DataLoader worker process 0.\nTraceback ...\nfinetune.sample.DataError: bad record\n"
    assert outcome.message_of(UserError(text)) == "bad record"
    assert outcome.message_of(UserError("plain")) == "plain"
