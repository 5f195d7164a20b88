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
from pathlib import Path

import finetune
from finetune.arguments.flag_help import help_text
from finetune.commands.parser import CommandParser
from finetune.utils.errors import ArgumentError, UserError

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
    given, flags = build_parser().parse_known_args(argv)
    flags = [flag for flag in flags if flag != "--"]
    if given.help_all:
        print(help_text("python -m finetune train", everything=True))
        return 0
    if not flags:
        raise ArgumentError(
            "nothing to train: give a YAML file, or --model_name_or_path and --data_path; "
            "python -m finetune train --help shows how"
        )
    if given.method is not None:
        flags = _with_method(flags, given.method)
    options = _nodes(given)
    gpus = visible_gpus()
    if not gpus:  # one thread per process: more of them only get in each other's way
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    options += ["--nproc_per_node", str(given.nproc or gpus or _CPU_PROCESSES)]
    from finetune import launch

    return launch.main([*options, "--", str(SCRIPT), *flags])


def _with_method(flags: list[str], method: str) -> list[str]:
    """The flags with --use_lora as the method says.

    Raises:
        ArgumentError: the flags or their file say the other method.
    """
    from finetune.arguments.argv import parse_bool
    from finetune.arguments.early_flags import early_flags

    try:
        given = early_flags(flags).get("use_lora")
    except UserError:  # the launch says it, with the result line of a run
        return flags
    lora = method == "lora"
    if given is None:
        return [*flags, "--use_lora", str(lora).lower()]
    if parse_bool("--use_lora", given[0]) != lora:
        raise ArgumentError(
            f"{flags[0]} says use_lora {given[0]}, but this is a launcher of {'LoRA' if lora else 'full'} training: "
            f"use {'finetune_ds.sh' if lora else 'finetune_lora.sh'}, or python -m finetune train {flags[0]}"
        )
    return flags


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


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=["lora", "full"], help="refuse flags of the other method (the launchers')")
    parser.add_argument("--nproc", type=int, help="processes on this node (default: the visible GPUs, or 2 without)")
    parser.add_argument("--nnodes", type=int, help="nodes (default: SLURM's, or 1)")
    parser.add_argument("--node_rank", type=int, help="number of this node (default: SLURM's, or 0)")
    parser.add_argument("--master_addr", help="host of node 0 (default: SLURM's first, or localhost)")
    parser.add_argument("--master_port", type=int, help="port there (default: a free one, or one by the SLURM job)")
    parser.add_argument("--help_all", action="store_true", help="list every flag of training")
    return parser
