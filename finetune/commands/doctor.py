"""``python -m finetune doctor``: checks that this machine has what training needs, with a fix for what is missing.

Looks at Python, the packages and their tested versions, the driver and every GPU, a collective between two processes, a
compiler for offload, shared memory, limits, disk, optional packages and access to the hub. Changes nothing.
--json prints it for a bug report. Exit status: 0 when nothing is wrong, 1 otherwise; warnings do not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import finetune
from finetune.commands.parser import CommandParser

GIB = 2**30
_REQUIREMENTS = Path(finetune.__file__).resolve().parents[1] / "requirements.txt"
# Workers hand samples to their rank through shared memory; containers often have 64 MB of it.
_SHARED_MEMORY = 1 * GIB
_OPEN_FILES = 4096
_DISK = 20 * GIB
_COLLECTIVE_SECONDS = 120
_HUB_SECONDS = 10
_OPTIONAL = {
    "flash_attn": ("--attn_implementation flash_attention_2", "pip install flash-attn --no-build-isolation"),
    "bitsandbytes": ("--q_lora and 8 bit optimizers", "pip install -e '.[quant]'"),
    "av": ("videos and compressed audio", "pip install -e '.[video]'"),
    "fla": ("fast linear attention and packing of 4.6 and later", "pip install -e '.[linear]'"),
    "simplejpeg": ("--image_backend fast", "pip install -e '.[fast]'"),
    "gradio": ("chat --web", "pip install -e '.[web]'"),
    "cv2": ("MiniCPM-OCR", "pip install -e '.[ocr]'"),
}
_COLLECTIVE = """
import sys, torch, torch.distributed as dist
rank, port, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if backend == "nccl": torch.cuda.set_device(rank)
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
tensor = torch.full((4,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
dist.all_reduce(tensor)
dist.destroy_process_group()
sys.exit(0 if tensor.tolist() == [3.0] * 4 else 3)
"""

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look has found.

    Attributes:
        name: what was looked at.
        state: "warning" for what only some runs need.
        seen: what is there.
        remedy: the line that mends it; empty where nothing is wrong.
    """

    name: str
    state: State
    seen: str
    remedy: str = ""


def main(argv: list[str]) -> int:
    """Runs ``python -m finetune doctor``; 1 where something is wrong that every run needs."""
    given = build_parser().parse_args(argv)
    findings = []
    for look in LOOKS:
        for finding in look():
            findings.append(finding)
            if not given.json:
                print(_line(finding), flush=True)
    wrong = sum(finding.state == "error" for finding in findings)
    if given.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        warnings = sum(finding.state == "warning" for finding in findings)
        print(f"{wrong} errors, {warnings} warnings: {'mend the errors first' if wrong else 'training can start'}")
    return int(wrong > 0)


def _line(finding: Finding) -> str:
    sign = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}[finding.state]
    return f"{sign} {finding.name:<15} {finding.seen}" + (f" -> {finding.remedy}" if finding.remedy else "")


def python() -> Iterator[Finding]:
    """The interpreter."""
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def packages() -> Iterator[Finding]:
    """Required packages, against the ranges that are tested."""
    from packaging.requirements import Requirement

    for line in _REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            installed = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Finding(wanted.name, "error", "not installed", f"pip install '{text}'")
            continue
        if wanted.specifier.contains(installed, prereleases=True):
            yield Finding(wanted.name, "ok", installed)
        else:
            yield Finding(wanted.name, "warning", f"{installed}, tested: {wanted.specifier}", f"pip install '{text}'")


def optional_packages() -> Iterator[Finding]:
    """Packages that only some runs need."""
    for module, (purpose, remedy) in _OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(module, "warning", f"not installed; for {purpose}", remedy)
        else:
            yield Finding(module, "ok", f"for {purpose}")


def gpus() -> Iterator[Finding]:
    """Driver, torch's CUDA, and every GPU with its free memory."""
    import torch

    smi = shutil.which("nvidia-smi")
    built = torch.version.cuda
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            seen = f"{properties.name}, compute {properties.major}.{properties.minor}, "
            seen += f"{free / GIB:.1f} of {total / GIB:.1f} GB free"
            if free < total * 0.8:
                yield Finding(f"gpu {index}", "warning", seen, "another program holds memory there: see nvidia-smi")
            else:
                yield Finding(f"gpu {index}", "ok", seen)
        yield Finding("bf16", "ok" if torch.cuda.is_bf16_supported() else "warning", f"CUDA {built} in torch")
    elif smi is None:
        yield Finding("gpu", "warning", "no NVIDIA driver: training runs on the CPU", "install the driver for a GPU")
    elif built is None:
        yield Finding("gpu", "error", "a driver is there, but torch is a CPU build", "install a CUDA build of torch")
    else:
        done = subprocess.run([smi], capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        remedy = "update the driver, or install a torch built for an older CUDA (nvidia-smi shows which it takes)"
        yield Finding("gpu", "error", f"torch has CUDA {built} and sees no GPU; nvidia-smi says: {said[0]}", remedy)


def collective() -> Iterator[Finding]:
    """An all-reduce between two processes."""
    import socket

    import torch

    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() > 1 else "gloo"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _COLLECTIVE, str(rank), port, backend],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said, statuses = [], []
    for rank in ranks:
        try:
            said.append(rank.communicate(timeout=_COLLECTIVE_SECONDS)[1])
        except subprocess.TimeoutExpired:
            rank.kill()
            said.append(f"no answer in {_COLLECTIVE_SECONDS} s")
        statuses.append(rank.returncode)
    if statuses == [0, 0]:
        yield Finding("collective", "ok", f"two processes, {backend}")
    else:
        last = next((text.strip().splitlines()[-1] for text in said if text.strip()), f"statuses {statuses}")
        remedy = "run with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 helps where GPUs cannot reach each other"
        if backend == "gloo":
            remedy = "a firewall or a missing loopback interface: export GLOO_SOCKET_IFNAME=lo"
        yield Finding("collective", "error", f"{backend}: {last}", remedy)


def compiler() -> Iterator[Finding]:
    """What DeepSpeed needs to compile its optimizer for offload."""
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        yield Finding("compiler", "warning", "no g++: *_offload.json cannot compile DeepSpeed's optimizer",
                      "apt-get install g++")  # fmt: skip
    elif shutil.which("ninja") is None:
        yield Finding("compiler", "warning", f"{found}, no ninja: *_offload.json cannot compile", "pip install ninja")
    else:
        yield Finding("compiler", "ok", f"{found}, for *_offload.json")


def machine() -> Iterator[Finding]:
    """Shared memory, open files, memory, disk and the temporary folder."""
    shared = Path("/dev/shm")  # noqa: S108 - where the C library puts it
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        remedy = "docker run --shm-size=16g (or --ipc=host)" if size < _SHARED_MEMORY else ""
        yield Finding("shared memory", "error" if remedy else "ok", f"{size / GIB:.1f} GB in {shared}", remedy)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 <= files < _OPEN_FILES
    remedy = f"ulimit -n {_OPEN_FILES}" if few else ""
    yield Finding("open files", "warning" if few else "ok", f"at most {files}", remedy)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("memory", "ok", f"{pages / GIB:.0f} GB, {os.cpu_count()} CPU cores")
    for name, folder in (("disk here", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        little = free < _DISK and name == "disk here"
        remedy = "choose an --output_dir with more space: 100 GB per checkpoint of 8B in full" if little else ""
        yield Finding(name, "warning" if little else "ok", f"{free / GIB:.0f} GB free in {folder}", remedy)


def hub() -> Iterator[Finding]:
    """Whether checkpoints can be fetched by their hub id."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        seen = "HF_HUB_OFFLINE is set: only folders and cached checkpoints"
        yield Finding("hub", "warning", seen, "unset HF_HUB_OFFLINE")
        return
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/openbmb/MiniCPM-V-2_6", timeout=_HUB_SECONDS):
            yield Finding("hub", "ok", constants.ENDPOINT)
    except (OSError, ValueError) as error:
        remedy = "set HF_ENDPOINT to a mirror, or download the checkpoint elsewhere and give its folder"
        yield Finding("hub", "warning", f"{constants.ENDPOINT}: {error}", remedy)


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python,
    packages,
    gpus,
    collective,
    compiler,
    machine,
    optional_packages,
    hub,
)


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for a bug report")
    return parser
