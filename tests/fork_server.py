"""``forked_python``: a python whose processes are forked from one that has imported what training needs.

For tests of what a program does; how it starts is seen by those that start it as users do. Importing torch,
transformers, peft and DeepSpeed takes longer than most of these programs take with their tiny networks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# On the CPU, one thread each: threads of OpenMP and CUDA survive no fork.
SETTINGS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
SETTINGS |= {"TOKENIZERS_PARALLELISM": "false"}
# The last one is what every ZeRO engine imports when it starts.
MORE = ("preference_trainer", "torch.distributed.run", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer")
# Called as python is; the code of -c may be anything, so it gets a process of its own.
_PYTHON = """#!/bin/sh
[ "$1" != -c ] || exec {python} "$@"
[ "$1" != -u ] || shift
exec {python} -SE {client} {socket} "$@"
"""


@contextmanager
def forking() -> Iterator[str]:
    """The path of a program that is called as python is with a script, or ``-m`` and a module."""
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:
        path, program = Path(folder) / "socket", Path(folder) / "python"
        client = Path(__file__).with_name("fork_client.py")
        parts = {"python": sys.executable, "client": str(client), "socket": str(path)}
        program.write_text(_PYTHON.format(**{name: shlex.quote(part) for name, part in parts.items()}))
        program.chmod(0o755)
        environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__)), str(path)]
        server = subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert server.stdout is not None
            assert server.stdout.readline(), "the server could not start"
            yield str(program)
        finally:
            server.communicate()  # it ends with its input


def serve(path: str) -> None:
    """Forks a process for every connection, until the input of this one ends."""
    from finetune.runtime.imports import TRAINING_MODULES, import_at_start
    from finetune.utils.errors import silence_unactionable_warnings

    silence_unactionable_warnings()
    ready = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    import_at_start(*TRAINING_MODULES, *MORE)
    running: dict[socket.socket, ForkProcess] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        os.write(ready, b"ready\n")
        while True:
            seen = wait([0, listener, *running, *(process.sentinel for process in running.values())])
            if 0 in seen:
                return
            if listener in seen:
                connection, _ = listener.accept()
                running[connection] = _start(connection)
            for connection, process in list(running.items()):
                if connection in seen:  # its client has ended
                    process.kill()
                if connection in seen or process.exitcode is not None:
                    process.join()
                    _answer(connection, process.exitcode)
                    del running[connection]


def _start(connection: socket.socket) -> ForkProcess:
    size, streams, *_ = socket.recv_fds(connection, 8, 3)
    order, length = b"", int.from_bytes(size, "big")
    while len(order) < length:
        order += connection.recv(length - len(order))
    process = multiprocessing.get_context("fork").Process(target=_run, args=(json.loads(order), streams))
    process.start()
    for stream in streams:
        os.close(stream)
    connection.sendall(struct.pack("q", process.pid))
    return process


def _answer(connection: socket.socket, status: int | None) -> None:
    with connection, suppress(BrokenPipeError):  # of a client that was ended
        connection.sendall(struct.pack("q", status))


def _run(order: dict[str, Any], streams: list[int]) -> None:
    """The program as the main one of this process."""
    from finetune.runtime.processes import end_with_parent

    end_with_parent()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin = open(0)  # noqa: SIM115 - for as long as the process lives
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    tempfile.tempdir = None  # that of the new TMPDIR
    first, *words = order["words"]
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [order["cwd"] if first == "-m" else str(Path(first).parent), *filter(None, added)]
    if first == "-m":
        sys.argv[:] = words
        sys.modules.pop(f"{words[0]}.__main__", None)  # runpy warns of one that is there already
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [first, *words]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
    os._exit(0)  # what still runs ends with this process
