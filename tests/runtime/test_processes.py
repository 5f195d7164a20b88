"""Ranks end with their launcher, dataloader workers with their rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from finetune.runtime import processes

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
CHILD = """
import ctypes, time
from finetune.runtime import processes
{setup}
processes.end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
# A sandbox may forbid the call.
FORBIDDEN = "processes._POLL_SECONDS = 0.1; ctypes.CDLL = lambda *a, **k: object()"
# The batches do not fit into a pipe: such a dataloader worker blocks for ever.
RANK = """
import torch
from torch.utils.data import DataLoader, Dataset
from finetune.media import worker_process
class Large(Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index):
        worker_process.configure_worker()
        return bytes(10_000_000)
loader = iter(DataLoader(Large(), batch_size=None, num_workers=2, collate_fn=lambda sample: sample))
next(loader)
import multiprocessing
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
import time
time.sleep(60)
"""


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(processes._is_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("setup", ["", FORBIDDEN])
def test_a_process_ends_with_its_parent(setup):
    command = [sys.executable, "-c", PARENT, CHILD.format(setup=setup)]
    parent = subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.communicate(timeout=60)
    assert gone([child])


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_whose_launcher_has_died_while_it_was_starting_ends(lives):
    environment = {**os.environ, processes.ABOVE: str(os.getpid() if lives else 2**22 + 1)}
    code = "from finetune.runtime import processes; processes.end_with_launcher(); print('here')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout == "here\n") is lives


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_loader_processes_end_with_their_rank(number, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    rank = subprocess.Popen([sys.executable, "-c", RANK], cwd=ROOT, env=environment, stdout=-1, text=True)
    assert rank.stdout is not None
    loaders = [int(word) for word in rank.stdout.readline().split()]
    assert len(loaders) == 2
    os.kill(loaders[0], signal.SIGTERM)
    time.sleep(0.2)
    assert processes._is_alive(loaders[0]), "only its rank may end it that way"
    rank.send_signal(number)
    rank.communicate(timeout=60)
    assert gone(loaders)


def test_a_dead_rank_is_seen(tmp_path, monkeypatch):
    monkeypatch.delenv(processes.RUN_FOLDER, raising=False)
    assert not processes.any_rank_died()
    monkeypatch.setenv(processes.RUN_FOLDER, str(tmp_path))
    assert not processes.any_rank_died()
    folder = tmp_path / processes.PROCESSES
    folder.mkdir()
    (folder / str(os.getpid())).write_text("rank")
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
    (folder / str(other.pid)).write_text("loader")
    other.kill()
    gone([other.pid])
    assert not processes.any_rank_died(), "dataloader workers come and go"
    (folder / str(other.pid)).write_text("rank")
    assert processes.any_rank_died()
    other.communicate(timeout=60)
