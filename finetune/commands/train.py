"""``python -m finetune train [FILE.yaml] [--flag value ...]``: one command that starts any training.

FILE.yaml holds flags of finetune.py, or is a file of LLaMA-Factory as it is. The number of processes is that of the
visible GPUs, or two on a machine without one; on several nodes the variables of SLURM say who is who. Flags, model and
data are looked at before any process starts. All flags of training: --help_all.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import finetune
from finetune.commands.parser import CommandParser
from finetune.utils.errors import ArgumentError

SCRIPT = Path(finetune.__file__).resolve().parents[1] / "finetune.py"
_CPU_PROCESSES = 2
_PORT = 6001


def main(argv: list[str]) -> int:
    """Runs ``python -m finetune train``; returns the exit status of the run."""
    if not SCRIPT.is_file():
        raise ArgumentError(
            f"{SCRIPT} is missing: training needs the repository, not the package alone; clone it and run "
            "pip install -e . there"
        )
    given, flags = _parser().parse_known_args(argv)
    flags = [flag for flag in flags if flag != "--"]
    if given.help_all:
        return subprocess.call([sys.executable, str(SCRIPT), "--help"])
    if not flags:
        raise ArgumentError(
            "nothing to train: give a YAML file, or --model_name_or_path and --data_path; "
            "python -m finetune train --help shows how"
        )
    options = _nodes(given)
    gpus = visible_gpus()
    if not gpus:  # one thread per process: more of them only get in each other's way
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    options += ["--nproc_per_node", str(given.nproc or gpus or _CPU_PROCESSES)]
    from finetune import launch

    return launch.main([*options, "--", str(SCRIPT), *flags])


def visible_gpus() -> int:
    """GPUs that a process here may use; CUDA's list of visible devices ends at the first negative one."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        devices = [device.strip() for device in listed.split(",")]
        ends = [place for place, device in enumerate(devices) if device.startswith("-")]
        return sum(map(bool, devices[: ends[0]] if ends else devices))
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return len(re.findall(r"^GPU", done.stdout, re.MULTILINE))


def _nodes(given: argparse.Namespace) -> list[str]:
    """Options of torchrun about nodes: from the command line, else from SLURM, else one node and a free port."""
    nodes, rank, address, port = given.nnodes, given.node_rank, given.master_addr, given.master_port
    slurm = os.environ.get("SLURM_NNODES", "1")
    if nodes is None and slurm.isdecimal() and int(slurm) > 1 and "SLURM_NODEID" in os.environ:
        nodes, rank = int(slurm), int(os.environ["SLURM_NODEID"]) if rank is None else rank
        address = address or _first_host(os.environ.get("SLURM_JOB_NODELIST", ""))
        # The same on every node, another one for every job.
        port = port or 10000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000
    nodes = nodes or 1
    if nodes > 1 and (rank is None or address is None):
        raise ArgumentError(
            f"--nnodes {nodes} needs --node_rank (0 to {nodes - 1}) and --master_addr (the node of rank 0)"
        )
    port = port or (_free_port() if nodes == 1 else _PORT)
    pairs = {"nnodes": nodes, "node_rank": rank or 0, "master_addr": address or "localhost", "master_port": port}
    return [word for name, value in pairs.items() for word in (f"--{name}", str(value))]


def _first_host(nodes: str) -> str:
    """The first host of SLURM's short form of a list, e.g. n1 of n[1-4]."""
    done = None
    if shutil.which("scontrol") is not None:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if done is None or not done.stdout.split():
        raise ArgumentError(
            f"SLURM_JOB_NODELIST is {nodes!r} and scontrol does not say whose it is: give --master_addr"
        )
    return done.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m finetune train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc", type=int, help="processes on this node (default: the visible GPUs, or 2 without)")
    parser.add_argument("--nnodes", type=int, help="nodes (default: SLURM's, or 1)")
    parser.add_argument("--node_rank", type=int, help="number of this node (default: SLURM's, or 0)")
    parser.add_argument("--master_addr", help="host of node 0 (default: SLURM's first, or localhost)")
    parser.add_argument("--master_port", type=int, help="port there (default: a free one, or one by the SLURM job)")
    parser.add_argument("--help_all", action="store_true", help="list every flag of training")
    return parser
