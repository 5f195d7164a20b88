"""Runs commands side by side, such as the ranks of a run, until all have ended well."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from fork_server import ROOT, SETTINGS

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Command(NamedTuple):
    """The words of a command, and its variables beside those of the tests."""

    words: Sequence[str]
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed


def ranks(words: Sequence[str], world: int = 2, **environment: str) -> list[Command]:
    """The commands by which torchrun would start a program on its ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        Command(words, {**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)
    ]


def run_all(*commands: Command, cwd: Path = ROOT, timeout: float = 600) -> list[subprocess.CompletedProcess[str]]:
    """Runs commands side by side until all have ended well; when one fails, the others are ended.

    A rank that waits for another one is a hang: the timeout, in seconds, is its only alarm.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK} | SETTINGS
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        streams = [[(Path(folder) / f"{place}{name}").open("w+") for name in "oe"] for place in range(len(commands))]
        started = [
            subprocess.Popen(words, env=variables | more, cwd=cwd, stdout=out, stderr=err)
            for (words, more), (out, err) in zip(commands, streams, strict=True)
        ]
        try:
            while (codes := [process.poll() for process in started]).count(None) and not any(codes):
                assert time.monotonic() < deadline, f"no end within {timeout} s"
                time.sleep(0.02)
        finally:
            for process in started:
                process.kill()
                process.wait()
        said = [[_content(stream) for stream in of_one] for of_one in streams]
    assert not any(codes), f"{codes}: {[(out + err)[-4000:] for out, err in said]}"
    return [subprocess.CompletedProcess(one.args, 0, *texts) for one, texts in zip(started, said, strict=True)]


def _content(stream: IO[str]) -> str:
    with stream:
        stream.seek(0)
        return stream.read()
