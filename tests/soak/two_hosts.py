"""Cuts the network between the two hosts of a run, and goes on with it when the network is back.

The hosts are two network namespaces of this machine with a cable between them; making those needs root and iproute2.
Each has one rank, as ``NNODES=2`` starts them through the launcher, and both see the same output folder. Once the run
has a checkpoint the cable is unplugged: nothing tells a rank that its peer is out of reach, so it is ``--hang_timeout``
that ends both. Then the same two commands go on, and the result must be that of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "soak")]

import psutil  # noqa: E402
from soak import differences  # noqa: E402

from finetune.tiny.checkpoint_writer import write_tiny_checkpoint  # noqa: E402
from finetune.tiny.demo_dataset import write_demo_dataset  # noqa: E402

HOSTS = {"soak-a": "10.177.0.1", "soak-b": "10.177.0.2"}
HANG = 20
# Seconds after the timeout within which both must have ended.
PATIENCE = 60
FLAGS = (
    f"--max_steps 10 --save_steps 2 --gradient_accumulation_steps 2 --max_slice_nums 1 --learning_rate 1e-2 "
    f"--verify_adapter off --report_to none --disable_tqdm true --resume_from_checkpoint auto --hang_timeout {HANG}"
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def plug() -> None:
    """Two hosts and the cable between them."""
    for host in HOSTS:
        ip("netns", "add", host)
        ip("-n", host, "link", "set", "lo", "up")
    first, second = HOSTS
    ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
    for host, address in HOSTS.items():
        ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", host, "link", "set", "eth0", "up")


def unplug() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], check=False, stderr=subprocess.DEVNULL)


def start(root: Path, output: Path) -> list[subprocess.Popen[bytes]]:
    """The launcher on both hosts."""
    started = []
    for rank, host in enumerate(HOSTS):
        environment = {
            **os.environ, "MODEL": str(root / "base"), "DATA": str(root / "data" / "train.json"), "EVAL_DATA": "",
            "OUTPUT_DIR": str(output), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GPUS_PER_NODE": "1",
            "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": next(iter(HOSTS.values())), "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        log = (root / f"{output.name}-{host}.log").open("ab")
        command = ["ip", "netns", "exec", host, "sh", str(ROOT / "finetune_lora.sh"), *FLAGS.split()]
        started.append(subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log))
    return started


def ends(processes: Sequence[subprocess.Popen[bytes]], within: float) -> list[int | None]:
    """Statuses; None for one that has not ended in time."""
    deadline = time.monotonic() + within
    statuses: list[int | None] = []
    for process in processes:
        try:
            statuses.append(process.wait(max(deadline - time.monotonic(), 0)))
        except subprocess.TimeoutExpired:
            statuses.append(None)
    return statuses


def main() -> int:
    """Runs it and prints what happened; 1 where something was lost or did not end."""
    unplug()
    with tempfile.TemporaryDirectory(prefix="s") as name:
        root = Path(name)
        write_tiny_checkpoint("llama3_v2_5", root / "base")
        write_demo_dataset(root / "data", train=32, eval=8)
        try:
            return judge(root)
        finally:
            unplug()


def judge(root: Path) -> int:
    """The story; the last word is the exit status."""
    plug()
    whole, output = root / "whole", root / "out"
    if (statuses := ends(start(root, whole), 300)) != [0, 0]:
        print(f"two hosts do not train at all: {statuses}\n{(root / 'whole-soak-a.log').read_text()[-2000:]}")
        return 1
    both = start(root, output)
    while not (output / "checkpoint-4" / "manifest.json").is_file():
        if any(process.poll() is not None for process in both):
            print((root / "out-soak-a.log").read_text()[-2000:])
            return 1
        time.sleep(0.05)
    everyone = [child for process in both for child in psutil.Process(process.pid).children(recursive=True)]
    ip("-n", "soak-a", "link", "set", "eth0", "down")
    cut = time.monotonic()
    statuses = ends(both, HANG + PATIENCE)
    _, left = psutil.wait_procs(everyone, timeout=10)
    print(f"cut off: statuses {statuses} after {time.monotonic() - cut:.0f} s; {len(left)} processes left")
    stacks = sorted(path.relative_to(output).as_posix() for path in output.glob("hang/*/*"))
    print(f"stacks: {stacks}")
    for host in HOSTS:
        print(f"{host}: {(root / f'out-{host}.log').read_text().splitlines()[-1]}")
    if None in statuses or left:
        return 1
    ip("-n", "soak-a", "link", "set", "eth0", "up")
    shutil.rmtree(output / "hang")
    statuses = ends(start(root, output), 300)
    found = list(differences(whole, output, "lora"))
    print(f"gone on: statuses {statuses}; {'the same result' if not found else found[:3]}")
    return int(statuses != [0, 0] or bool(found))


if __name__ == "__main__":
    sys.exit(main())
