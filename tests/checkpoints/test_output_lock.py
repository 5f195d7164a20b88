"""The lock of the output folder: one run at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from finetune.checkpoints import output_lock
from finetune.checkpoints.output_lock import SILENCE, OutputInUseError, OutputLock, this_process

ROOT = Path(__file__).resolve().parent.parent.parent
HOLD = """
import sys
from pathlib import Path
from finetune.checkpoints.output_lock import OutputLock
owner = OutputLock(Path(sys.argv[1]))
print("owned", flush=True)
sys.stdin.read()
"""


def leave_behind(folder: Path, seconds_ago: float, **changes) -> None:
    """What a run has left that ended without a word."""
    folder.mkdir(parents=True)
    path = folder / "owner.json"
    path.write_text(json.dumps(asdict(replace(this_process(), **changes))))
    now = path.stat().st_mtime
    os.utime(path, (now, now - seconds_ago))


def test_a_second_run_is_told_who_holds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    folder = tmp_path / "out" / ".finetune"
    first = OutputLock(folder)
    with pytest.raises(OutputInUseError) as refused:
        OutputLock(folder)
    me = this_process()
    for part in (str(tmp_path / "out"), f"process {me.pid} on {socket.gethostname()}, started 20", "launcher job-7"):
        assert part in str(refused.value)
    first.release()
    second = OutputLock(folder)
    second.release()
    assert list(folder.iterdir()) == []


def test_a_process_that_is_killed_holds_nothing(tmp_path, caplog):
    folder = tmp_path / "out" / ".finetune"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "owned\n"
    with pytest.raises(OutputInUseError, match=f"process {other.pid} on"):
        OutputLock(folder)
    other.kill()
    other.communicate(timeout=60)
    OutputLock(folder).release()
    assert f"was locked by process {other.pid} on {socket.gethostname()}" in caplog.text
    assert "taken over" in caplog.text


@pytest.mark.parametrize(("silent", "owned"), [(SILENCE - 60, True), (SILENCE + 60, False)])
def test_another_host_is_waited_for(tmp_path, caplog, silent, owned):
    """Its locks may not reach this one; its heartbeat does."""
    folder = tmp_path / ".finetune"
    leave_behind(folder, silent, host="node-2")
    if owned:
        with pytest.raises(OutputInUseError, match=r"on node-2, .* its last heartbeat is 1\d\d s old, after 180 s"):
            OutputLock(folder)
        assert (folder / "owner.json").is_file()
    else:
        OutputLock(folder).release()
        assert "on node-2" in caplog.text
        assert "taken over" in caplog.text


def test_the_number_of_a_dead_process_may_be_given_again(tmp_path, caplog):
    folder = tmp_path / ".finetune"
    leave_behind(folder, 1, started=this_process().started - 100)
    OutputLock(folder).release()
    assert "taken over" in caplog.text


def test_without_file_locks_the_heartbeat_counts(tmp_path, monkeypatch, caplog):
    def unsupported(*args: object, **kwargs: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(output_lock.FileLock, "acquire", unsupported)
    folder = tmp_path / ".finetune"
    first = OutputLock(folder)
    assert "does not support file locks" in caplog.text
    with pytest.raises(OutputInUseError):
        OutputLock(folder)
    first.release()
    OutputLock(folder).release()


def test_the_heart_beats_until_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "HEARTBEAT", 0.01)
    folder = tmp_path / ".finetune"
    owner = OutputLock(folder)
    path = folder / "owner.json"
    os.utime(path, (0, 0))
    while path.stat().st_mtime == 0:
        pass
    owner.release()
    assert not path.exists()


def test_loader_processes_do_not_keep_it(tmp_path):
    """Made by fork, they have the file open too; when one ends, the lock stays."""
    folder = tmp_path / ".finetune"
    owner = OutputLock(folder)
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(OutputInUseError):
        OutputLock(folder)
    owner.release()
