"""The SLURM script: the launcher is started on every machine with what torchrun needs to find the others."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from finetune.arguments.training import TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples/slurm/finetune.sbatch"
# srun without SLURM: the command once for each of two machines.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" || exit $?; done
"""
SCONTROL = '#!/bin/sh\n[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"\n'


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment that SLURM gives a job, and stand-ins for its commands."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[07-08]"}
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "DRY_RUN": "1"}
    return kept | slurm | path | {"SLURM_SUBMIT_DIR": str(ROOT), "CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def submit(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *flags], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_it_is_a_script() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    text = SCRIPT.read_text(encoding="utf-8")
    # sbatch reads options only above the first command
    assert text.rindex("#SBATCH") < text.index("\nset -eu")
    assert "--ntasks-per-node=1" in text


def test_every_machine_starts_the_launcher(cluster, tmp_path) -> None:
    done = submit({**cluster, "MODEL": "a model", "OUTPUT_DIR": str(tmp_path / "out")}, "--learning_rate", "3e-6")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if "finetune.py" in line]
    assert len(lines) == 2
    for rank, words in enumerate(lines):
        given = dict(zip(words, words[1:], strict=False))
        assert (given["--nnodes"], given["--node_rank"], given["--nproc_per_node"]) == ("2", str(rank), "4")
        assert (given["--master_addr"], given["--master_port"]) == ("node07", "24711")
        assert (given["--resume_from_checkpoint"], given["--learning_rate"]) == ("auto", "3e-6")
        assert given["--model_name_or_path"] == "a model"
        assert given["--tune_llm"] == "true"
        assert given["--output_dir"] == str(tmp_path / "out")


def test_another_launcher(cluster) -> None:
    done = submit({**cluster, "LAUNCHER": "finetune_lora.sh"})
    assert "'--use_lora' 'true'" in done.stdout
    done = submit({**cluster, "LAUNCHER": "nothing.sh"})
    assert done.returncode == 2
    assert "nothing.sh" in done.stderr


def test_its_flags_exist() -> None:
    call = SCRIPT.read_text(encoding="utf-8").rpartition("exec srun")[2]
    named = set(re.findall(r"--([a-z_]+)", call.partition('"$launcher"')[2]))
    assert named
    assert named <= {entry.name for entry in fields(TrainingArguments)}
