"""Kills runs at random, over and over, through the real launchers, and looks at what is lost and what is left.

``make soak`` runs it; it is not part of the tests. For LoRA and full training with ZeRO-2 and ZeRO-3 a run of ten steps
with evaluation, records that cannot be used and loader processes is started, ended by a random signal to a random
process at a random moment and started again with ``--resume_from_checkpoint auto``, until it comes to its end. Then its
weights and losses must be those of a run that nobody disturbed, to the bit. After every signal all processes must be
gone within ten seconds, and nothing may be left in the temporary folder and in /dev/shm once the next run has begun.

The last part trains for longer and looks at the memory of every process: after its warm-up it must not grow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from finetune.runtime import outcome  # noqa: E402
from finetune.tiny.checkpoint_writer import write_tiny_checkpoint  # noqa: E402
from finetune.tiny.demo_dataset import write_demo_dataset  # noqa: E402

SCRIPTS = {"lora": "finetune_lora.sh", "full": "finetune_ds.sh"}
WAYS = [(method, stage) for method in SCRIPTS for stage in (2, 3)]
STEPS = 10
FLAGS = (
    f"--max_steps {STEPS} --save_steps 2 --eval_steps 5 --gradient_accumulation_steps 2 --max_slice_nums 1 "
    "--learning_rate 1e-2 --verify_adapter off --report_to tensorboard --disable_tqdm true --dataloader_num_workers 2 "
    "--on_bad_sample skip --max_bad_share 0.5 --save_total_limit 2 --resume_from_checkpoint auto"
)
# What ends a run, and how often; the launcher is what a scheduler or a shell knows of it.
SIGNALS = [signal.SIGKILL] * 5 + [signal.SIGTERM] * 2 + [signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]
VICTIMS = ["launcher"] * 4 + ["rank"] * 2 + ["loader"] + ["everything"] * 2
GONE_WITHIN = 10.0
# Growth of memory that is not called growth, and looks at a process that a third of its life must have.
GROWTH, MEASURED = 0.02, 10
# Statuses of a run that was ended; negative where the signal came before anybody listened.
ENDED = {outcome.FAILED, outcome.STOPPED, outcome.INTERRUPTED}
ENDED |= {status for number in SIGNALS for status in (-number, 128 + number)}


@dataclass
class Tally:
    """What has happened."""

    kills: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    runs: int = 0
    slowest_end: float = 0.0
    complaints: list[str] = field(default_factory=list)

    def complain(self, text: str) -> None:
        self.complaints.append(text)
        print(f"FAULT: {text}", flush=True)


class Bench:
    """Where runs are started, and what they are started with."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.tally = Tally()
        self.temporary = root / "t"
        self.temporary.mkdir()
        self.base = write_tiny_checkpoint("llama3_v2_5", root / "base")
        self.data = write_demo_dataset(root / "data", train=24, eval=8)
        for name in ("train.json", "eval.json"):
            path = self.data / name
            records = json.loads(path.read_text())
            for record in self.random.sample(records, len(records) // 6):
                record["image"] = "no_such.png"
            path.write_text(json.dumps(records))

    def start(self, method: str, stage: int, output: Path, *flags: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "MODEL": str(self.base), "DATA": str(self.data / "train.json"), "OUTPUT_DIR": str(output),
            "EVAL_DATA": str(self.data / "eval.json"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "DS_CONFIG": f"ds_config_zero{stage}.json", "TMPDIR": str(self.temporary),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        log = (output.parent / f"{output.name}.log").open("ab")
        return subprocess.Popen(
            ["sh", str(ROOT / SCRIPTS[method]), *FLAGS.split(), *flags],
            cwd=output.parent, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def whole(self, method: str, stage: int) -> tuple[Path, float]:
        """A run that nobody disturbs, and how long it takes."""
        output = self.root / f"{method}-{stage}-whole"
        began = time.monotonic()
        process = self.start(method, stage, output)
        if process.wait() != 0:
            raise SystemExit((self.root / f"{output.name}.log").read_text())
        return output, time.monotonic() - began


def members(process: subprocess.Popen[bytes]) -> dict[str, list[psutil.Process]]:
    """The processes of a run by kind."""
    try:
        launcher = psutil.Process(process.pid)
        ranks = launcher.children()
        # Made by fork, they have the command line of their rank; helpers of Python's own have another.
        loaders = [child for rank in ranks for child in rank.children() if child.cmdline() == rank.cmdline()]
    except psutil.NoSuchProcess:
        return {}
    return {"launcher": [launcher], "rank": ranks, "loader": loaders, "everything": [launcher, *ranks, *loaders]}


def state(process: subprocess.Popen[bytes], log: Path) -> str:
    """What a run that should be gone is doing: its processes, with stacks where py-spy is installed, and its log."""
    lines: list[str] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for one in (launcher, *launcher.children(recursive=True)):
            lines.append(f"{one.pid} {one.status()}: {' '.join(one.cmdline())[:150]}")
            if shutil.which("py-spy"):
                command = ["py-spy", "dump", "-p", str(one.pid)]
                lines.append(subprocess.run(command, capture_output=True, text=True).stdout)
    return "\n".join([*lines, *log.read_text(errors="replace").splitlines()[-20:]])


def strike(bench: Bench, process: subprocess.Popen[bytes], wait: float, log: Path) -> None:
    """Ends a run after some seconds, and sees whether everything of it ends; it may have ended by itself."""
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        kind = bench.random.choice(VICTIMS)
        number = signal.SIGKILL if kind in ("loader", "everything") else bench.random.choice(SIGNALS)
        everyone = members(process)
        if not everyone.get(kind):  # before the first loader process there is none, and after the run nobody
            kind = "launcher"
        victims = everyone.get(kind, [])
        if kind != "everything":
            victims = bench.random.sample(victims, min(1, len(victims)))
        began = time.monotonic()
        for victim in victims:
            try:
                victim.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        if victims:
            bench.tally.kills[f"{number.name} to {kind}"] += 1
            print(f"  {number.name} to {kind} after {wait:.1f} s", flush=True)
        patience = GONE_WITHIN if number == signal.SIGKILL else 30 + GONE_WITHIN
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)  # by psutil its status would be lost
        _, left = psutil.wait_procs([*everyone.get("rank", []), *everyone.get("loader", [])], timeout=GONE_WITHIN)
        left += [psutil.Process(process.pid)] if process.poll() is None else []
        if left:
            took = f"{left} still alive after {time.monotonic() - began:.1f} s"
            bench.tally.complain(f"{number.name} to {kind}: {took}\n{state(process, log)}")
            for one in left:
                one.kill()
        bench.tally.slowest_end = max(bench.tally.slowest_end, time.monotonic() - began)
        process.wait()


def differences(one: Path, other: Path, method: str) -> Iterator[str]:
    """Where two results are not the same."""
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    if not (other / name).is_file():
        yield f"no {name}, though it ended well"
        return
    expected, found = load_file(one / name), load_file(other / name)
    if set(expected) != set(found):
        yield "other tensors"
    yield from (key for key in expected if key in found and not torch.equal(expected[key], found[key]))
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, other)]
    for key in ("loss", "eval_loss", "grad_norm"):
        figures = [[(entry["step"], entry[key]) for entry in history if key in entry] for history in histories]
        if figures[0] != figures[1]:
            yield f"{key}: {figures}"


def left_over(bench: Bench) -> list[str]:
    """What runs have left, once none is running."""
    shared = [path.name for path in Path("/dev/shm").glob("torch_*")]
    return [path.name for path in bench.temporary.iterdir()] + shared


def soak(bench: Bench, kills: int) -> None:
    """Strikes until there were so many kills, and compares every run that came to its end."""
    whole = {way: bench.whole(*way) for way in WAYS}
    number = 0
    while bench.tally.kills.total() < kills or number % len(WAYS):
        way = WAYS[number % len(WAYS)]
        number += 1
        reference, duration = whole[way]
        output = bench.root / f"{way[0]}-{way[1]}-{number}"
        while True:
            process = bench.start(*way, output)
            strike(bench, process, bench.random.uniform(0.1, 1.2) * duration, Path(f"{output}.log"))
            bench.tally.runs += 1
            bench.tally.statuses[process.returncode] += 1
            if process.returncode == 0:
                break
            if process.returncode not in ENDED:
                bench.tally.complain(f"status {process.returncode}\n{state(process, Path(f'{output}.log'))}")
                return
        if found := list(differences(reference, output, way[0])):
            bench.tally.complain(f"{output.name}: not what a run is that nobody disturbs: {found[:3]}")
        if left := left_over(bench):
            bench.tally.complain(f"{output.name}: left behind: {left[:5]}")
        print(f"{output.name}: the same; {bench.tally.kills.total()} kills", flush=True)
        shutil.rmtree(output)


def watched(process: subprocess.Popen[bytes]) -> dict[tuple[str, int], list[int]]:
    """Memory of every process of a run by kind and id, in bytes, every half second until it ends."""
    seen: dict[tuple[str, int], list[int]] = {}
    while process.poll() is None:
        for kind in ("launcher", "rank", "loader"):
            for one in members(process).get(kind, []):
                try:
                    seen.setdefault((kind, one.pid), []).append(one.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
        time.sleep(0.5)
    return seen


def memory(bench: Bench, steps: int) -> dict[str, float]:
    """Growth of the memory of every kind of process from the second to the last third of a run, as a share."""
    growth: dict[str, float] = {}
    for method, stage in (("lora", 2), ("full", 3)):
        output = bench.root / f"{method}-memory"
        process = bench.start(method, stage, output, "--max_steps", str(steps), "--save_steps", str(steps // 10))
        for (kind, _), figures in watched(process).items():
            third = len(figures) // 3
            if third < MEASURED:
                continue
            middle, last = (sorted(part)[third // 2] for part in (figures[third : 2 * third], figures[-third:]))
            name = f"{method} {kind}"
            growth[name] = max(growth.get(name, -1.0), last / middle - 1)
        if process.returncode:
            bench.tally.complain(f"status {process.returncode}\n{state(process, Path(f'{output}.log'))}")
    for name, share in growth.items():
        if share > GROWTH:
            bench.tally.complain(f"{name}: its memory has grown by {share:.1%}")
    return growth


def main() -> int:
    """Runs everything and prints what happened; 1 where anything was lost or left."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300, help="of the runs whose memory is watched; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="s") as root:
        bench = Bench(Path(root), options.seed)
        soak(bench, options.kills)
        growth = memory(bench, options.steps) if options.steps else {}
        tally = bench.tally
        print(f"{tally.kills.total()} kills in {tally.runs} runs: {dict(tally.kills.most_common())}")
        print(f"statuses: {dict(tally.statuses.most_common())}; slowest end {tally.slowest_end:.1f} s")
        print("memory, last third against the second: " + ", ".join(f"{k} {v:+.2%}" for k, v in growth.items()))
        print("\n".join(tally.complaints) or "nothing lost, nothing left")
        return bool(tally.complaints)


if __name__ == "__main__":
    sys.exit(main())
