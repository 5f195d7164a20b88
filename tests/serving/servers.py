"""Starts vLLM's and llama.cpp's servers on this machine, and ends them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-serving-vllm" / "bin" / "python"
LLAMA_PYTHON = ROOT / ".venv-serving-llama" / "bin" / "python"
LLAMA_PYTHON_OF_O2_6 = ROOT / ".venv-serving-llama-o2_6" / "bin" / "python"
LLAMA_CPP = ROOT / "build" / "llama.cpp"
_MINUTES = 10


@contextmanager
def vllm(model: Path, log: Path, *, dtype: str, adapter: Path | None = None, rank: int = 64) -> Iterator[str]:
    """vLLM's server of a model folder, called "tuned", or of an adapter on it; gives its url."""
    argv = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += ["--trust-remote-code", "--enforce-eager", "--max-model-len", "3000", "--dtype", dtype]
    argv += ["--limit-mm-per-prompt", '{"image": 4}', "--max-logprobs", "20"]
    if adapter is None:
        argv += ["--served-model-name", "tuned"]
    else:
        argv += ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", str(rank)]
        argv += ["--lora-modules", f"tuned={adapter}"]
    # One GB of key and value cache; without a GPU the default is most of the memory.
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with _server(argv, log, more, "/health") as url:
        yield url


@contextmanager
def llama_server(folder: Path, log: Path, language: str = "language.gguf", *more: str) -> Iterator[str]:
    """llama.cpp's server of an exported folder; gives its url."""
    argv = [str(LLAMA_CPP / "build" / "bin" / "llama-server"), "-m", str(folder / language)]
    argv += ["--mmproj", str(folder / "mmproj.gguf"), "--jinja", "-c", "4096", "-np", "1", *more]
    with _server(argv, log, {}, "/health") as url:
        yield url


@contextmanager
def _server(argv: Sequence[str], log: Path, more: Mapping[str, str], ready: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count()), **more}
    # Of the project's environment nothing is to be imported there.
    environment.pop("PYTHONPATH", None)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*argv, "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}{ready}", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Waits until a server is ready.

    Raises:
        RuntimeError: it ended, or is not ready after minutes; with the last lines of its log.
    """
    end = time.monotonic() + 60 * _MINUTES
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    raise RuntimeError("the server did not start:\n" + "\n".join(lines[-40:]))
