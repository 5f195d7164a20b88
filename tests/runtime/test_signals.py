"""Signals: a training process gets time to save; any other ends at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.runtime import outcome

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import os, sys, time
from finetune.runtime import outcome
outcome.install_exit_handlers()
{setup}
print("ready", flush=True)
while outcome.watch.request is None: time.sleep(0.01)
print(outcome.watch.request, flush=True)
{saving}
outcome.watch.saved()
outcome.exit_after_handlers(outcome.STOPPED)
"""
CAN_SAVE = "outcome.watch.can_save({seconds}, lambda: {failed})"


def ended(setup: str, *signals: signal.Signals, saving: str = "") -> tuple[int, list[str], str]:
    """Status, lines on stdout behind the first, and stderr of a process that gets signals."""
    code = CODE.format(setup=setup, saving=saving)
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_process_that_can_save_does(number):
    """However often it is asked; schedulers send a signal to the launcher, which passes it on, and to every process."""
    setup = CAN_SAVE.format(seconds=20, failed=False)
    status, out, err = ended(setup, number, number, saving="os.kill(os.getpid(), 15); time.sleep(0.2)")
    assert (status, out, err) == (outcome.STOPPED, [number.name], "")


def test_saving_that_takes_too_long_is_given_up():
    status, out, err = ended(CAN_SAVE.format(seconds=0.2, failed=False), signal.SIGTERM, saving="time.sleep(30)")
    assert (status, out[0]) == (outcome.INTERRUPTED, "SIGTERM")
    assert "0.2 seconds (--save_on_signal_timeout) were over" in err


def test_a_process_whose_peer_has_died_does_not_save():
    status, out, err = ended(CAN_SAVE.format(seconds=20, failed=True), signal.SIGTERM)
    assert status == outcome.INTERRUPTED
    assert "another process of the run has died" in err


@pytest.mark.parametrize("setup", ["", CAN_SAVE.format(seconds=20, failed=False) + "; outcome.watch.cannot_save()"])
def test_a_process_that_cannot_save_ends_at_once(setup):
    status, _, err = ended(setup, signal.SIGUSR1)
    assert status == outcome.INTERRUPTED
    assert "ended by SIGUSR1" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_what_a_forked_process_is_sent_is_not_for_its_parent(number):
    fork = f"""
if not os.fork():
    try: os.kill(os.getpid(), {int(number)}); time.sleep(0.1)
    finally: os._exit(0)
os.wait(); time.sleep(0.3)
assert outcome.watch.request is None
"""
    setup = "import finetune.runtime.signals; finetune.runtime.signals._INTERRUPT_SECONDS = 0.1; "
    status, out, _ = ended(setup + CAN_SAVE.format(seconds=20, failed=False) + fork, signal.SIGTERM)
    assert (status, out) == (outcome.STOPPED, ["SIGTERM"])


def test_nohup_is_respected():
    setup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); outcome.watch.install(); "
    setup += CAN_SAVE.format(seconds=20, failed=False)
    assert ended(setup, signal.SIGHUP, signal.SIGTERM)[1] == ["SIGTERM"]


def test_ctrl_c_ends_a_process_that_waits_in_c_code():
    """Its main thread never gets to raise KeyboardInterrupt."""
    setup = "import finetune.runtime.signals; finetune.runtime.signals._INTERRUPT_SECONDS = 0.5; import hashlib"
    wait = "print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    assert ended(f"{setup}; {wait}", signal.SIGINT)[0] == outcome.INTERRUPTED
