"""Interrupted runs with two processes, through the launchers: resuming is bit-identical to an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from finetune.commands import consolidate
from finetune.runtime import outcome
from finetune.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"lora": "finetune_lora.sh", "full": "finetune_ds.sh"}
# Shuffled data and (LoRA) dropout 0.05, so that order and random numbers have to be restored as well.
FLAGS = (
    "--max_steps 10 --save_steps 5 --gradient_accumulation_steps 2 --gradient_checkpointing false --max_slice_nums 1 "
    "--verify_adapter off --dataloader_num_workers 0 --learning_rate 1e-2 --report_to none --disable_tqdm true"
)


def start(method: str, base: Path, data: Path, output: Path, *flags: str, **env: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "MODEL": str(base),
        "DATA": str(data / "train.json"),
        "EVAL_DATA": "",
        "OUTPUT_DIR": str(output),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **env,
    }
    return subprocess.Popen(
        ["sh", str(ROOT / SCRIPTS[method]), *FLAGS.split(), *flags],
        cwd=output.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(*args, **env: str) -> tuple[int, str, str]:
    process = start(*args, **env)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def result_of(out: str) -> dict:
    return json.loads(out.splitlines()[-1].removeprefix("result="))


def losses(output: Path) -> list[tuple[int, float, float]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


def assert_same_result(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert len(losses(one)) == 10
    name = "adapter_model.safetensors" if (one / "adapter_model.safetensors").exists() else "model.safetensors"
    expected, found = load_file(one / name), load_file(other / name)
    assert set(expected) == set(found)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def uninterrupted(tiny, demo_data, tmp_path_factory, forked_python):
    """Output folder of a run of ten steps by method and ZeRO stage, made once; not to be written to."""
    made: dict[tuple[str, int], Path] = {}

    def make(method: str, stage: int) -> Path:
        if (method, stage) not in made:
            output = tmp_path_factory.mktemp(f"{method}{stage}") / "out"
            env = {"DS_CONFIG": f"ds_config_zero{stage}.json", "PYTHON": forked_python}
            status, out, err = launch(method, tiny("llama3_v2_5"), demo_data, output, **env)
            assert status == 0, err
            result = result_of(out)
            assert (result["status"], result["steps"], result["verified"]) == ("ok", 10, None)
            assert (output / "loss.png").is_file()
            made[method, stage] = output
        return made[method, stage]

    return make


@pytest.mark.parametrize(("method", "stage"), [("lora", 3), ("full", 2), ("full", 3)])
def test_five_and_five_steps_are_ten(uninterrupted, tiny, demo_data, tmp_path, forked_python, method, stage):
    """The newest checkpoint is damaged, so the run resumes from the one before."""
    whole, output = uninterrupted(method, stage), tmp_path / "out"
    shutil.copytree(whole, output)
    for path in [*output.glob("*.safetensors"), output / "trainer_state.json"]:
        path.unlink()
    part = next((output / "checkpoint-10").rglob("*optim_states.pt"))
    part.write_bytes(part.read_bytes()[:-100])
    resume = ("--resume_from_checkpoint", "auto")
    env = {"DS_CONFIG": f"ds_config_zero{stage}.json", "PYTHON": forked_python}
    status, out, err = launch(method, tiny("llama3_v2_5"), demo_data, output, *resume, **env)
    assert status == 0, err
    assert "checkpoint-10 is not complete and is skipped: global_step10" in err
    assert f"resuming from {output / 'checkpoint-5'} (step 5)" in err
    assert_same_result(whole, output)
    steps = [json.loads(line)["step"] for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 11), 10]
    assert result_of(out)["train_loss"] == pytest.approx(sum(loss for _, loss, _ in losses(whole)) / 10)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def kill_during_a_save(process: subprocess.Popen[str], output: Path) -> int:
    """Kills the launcher, its ranks standing still during a save; the step of the last complete checkpoint."""
    for step in range(2, 7):
        wait_for((output / f"checkpoint-{step}").is_dir, process)
        ranks = psutil.Process(process.pid).children()
        for rank in ranks:
            rank.suspend()
        wait_for(lambda held=ranks: all(rank.status() == psutil.STATUS_STOPPED for rank in held), process)
        folder = output / f"checkpoint-{step}"
        # A save removes what is there before it writes: for a moment there is no folder.
        if folder.is_dir() and not (folder / "manifest.json").exists():
            process.kill()
            return step - 1
        for rank in ranks:  # it was faster than this look at it
            rank.resume()
    raise AssertionError("no save was slow enough to be met")


def test_killed_during_a_save_and_stopped_by_a_signal(uninterrupted, tiny, demo_data, tmp_path, forked_python):
    """kill -9 of the launcher during a save ends everything; the run resumes from the checkpoint before, gets a signal,
    saves, and resumes once more."""
    output = tmp_path / "out"
    base = tiny("llama3_v2_5")
    often = ("--save_steps", "1", "--dataloader_num_workers", "1")
    process = start("lora", base, demo_data, output, *often)
    wait_for((output / "checkpoint-1" / "manifest.json").is_file, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    assert len(everyone) >= 4, "two ranks, each with a dataloader worker"
    step = kill_during_a_save(process, output)
    process.communicate(timeout=60)
    psutil.wait_procs(everyone, timeout=10)
    assert alive(everyone) == []
    complete, cut = output / f"checkpoint-{step}", output / f"checkpoint-{step + 1}"
    assert [(path / "manifest.json").exists() for path in (complete, cut)] == [True, False]

    rare = ("--save_steps", "100", "--dataloader_num_workers", "1", "--resume_from_checkpoint", "auto")
    process = start("lora", base, demo_data, output, *rare)
    log = output / "trainer_log.jsonl"
    wait_for(lambda: f'"step": {step + 2},' in log.read_text(), process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == outcome.STOPPED, err
    assert alive(everyone) == []
    assert f"{output} was locked by process" in err
    assert f"{cut} is not complete and is skipped" in err
    assert f"resuming from {complete} (step {step})" in err
    stopped = result_of(out)
    assert (stopped["status"], stopped["exit_code"]) == ("stopped", outcome.STOPPED)
    assert "--resume_from_checkpoint auto continues from there" in stopped["message"]

    status, out, err = launch("lora", base, demo_data, output, *rare, PYTHON=forked_python)
    assert status == 0, err
    assert "was locked by process" not in err
    assert result_of(out)["steps"] == 10
    assert_same_result(uninterrupted("lora", 2), output)


@pytest.mark.parametrize(("method", "stage"), [("lora", 2), ("lora", 3), ("full", 2), ("full", 3)])
def test_the_parts_of_a_checkpoint_become_what_was_saved(uninterrupted, tmp_path, capsys, method, stage):
    """As after a run that ended before its weights were gathered."""
    saved = uninterrupted(method, stage) / "checkpoint-5"
    parts = Path(shutil.copytree(saved, tmp_path / "run" / "checkpoint-5"))
    shutil.copyfile(saved.parent / "run.yaml", parts.parent / "run.yaml")
    for path in parts.glob("*.safetensors*"):
        path.unlink()
    assert consolidate.main([str(parts), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "loads=true" in said
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    expected, found = load_file(saved / name), load_file(tmp_path / "out" / name)
    assert set(expected) == set(found)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    for each in ("tokenizer.json", "adapter_config.json" if method == "lora" else "config.json"):
        assert (tmp_path / "out" / each).read_bytes() == (saved / each).read_bytes()
    next(parts.rglob("*_optim_states.pt")).unlink()
    with pytest.raises(UserError, match="not complete"):
        consolidate.main([str(parts), str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def resume(output: Path, step: int) -> tuple[str, str]:
    return "--resume_from_checkpoint", str(output / f"checkpoint-{step}")


def test_another_number_of_processes(uninterrupted, tiny, demo_data, tmp_path, forked_python):
    """Two processes, then one, then two: the same weights as with two all along, up to the order of sums."""
    whole, base = uninterrupted("full", 2), tiny("llama3_v2_5")
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--gradient_accumulation_steps", "4", "--save_steps", "2", "--save_total_limit", "9")
    env = {"GPUS_PER_NODE": "1", "PYTHON": forked_python}
    status, out, err = launch("full", base, demo_data, one, *flags, *resume(whole, 5), **env)
    assert status == 0, err
    assert "from 2 to 1 processes" in err
    assert result_of(out)["steps"] == 10
    status, out, err = launch("full", base, demo_data, two, *resume(one, 8), PYTHON=forked_python)
    assert status == 0, err
    assert "from 1 to 2 processes" in err
    expected = load_file(whole / "model.safetensors")
    for output in (one, two):
        assert losses(output) == [pytest.approx(figures, rel=1e-4) for figures in losses(whole)]
        found = load_file(output / "model.safetensors")
        # A tenth of the learning rate, with which Adam makes steps where a gradient is nearly zero.
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-3
        assert not (output / ".finetune" / "universal").exists()
