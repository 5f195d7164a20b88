"""End-to-end training time, this toolkit against the published scripts: ``python benchmarks/end_to_end.py``.

``--official DIR`` takes the vendor's finetune folder for the other side's samples, not our re-creation of them.

Two ranks on the CPU, ZeRO-2, float32, the tiny MiniCPM-Llama3-V 2.5 of this tool, the same 16 samples in every
optimizer step: web pictures, documents, screenshots, small images. Ours: one row per rank (--packing batch), samples
prepared in one process per rank, no layer run again as everything fits; once with identical pixels, once with
--image_backend fast. Theirs is a plain re-creation of the published way: batch size 1 with 8 accumulated batches,
samples prepared by the training process as in official_samples.py, the network run as in official_network.py with
float32 logits of every position, and --gradient_checkpointing true as in every published launcher; once more without
that, for a comparison of what is left. The sides take turns; the medians of their runs count. The first steps of a run
do not: every process touches its memory for the first time in them. The losses of all steps must agree to 1e-4 of them.
The network is so small that preparing samples and what every micro-batch costs by itself are most of the time: that is
what is compared here, the step of a larger network is in step.py. Processes that prepare samples and those that train
share the cores, so nothing is hidden behind the step on our side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANKS, PER_RANK, STEPS, WARM = 2, 8, 24, 4
# There are samples beyond the last step, or the loader processes of one side would be idle in the last ones.
AHEAD = 6
# Of 16 samples: how many, width, height, words of the answer.
KINDS = ((9, 640, 480, 15), (2, 1344, 1344, 40), (2, 1920, 1080, 25), (3, 448, 300, 60))
SIDES = ("ours", "fast", "theirs", "theirs_plain")


def prepare(folder: Path) -> None:
    """A base with random weights, the pictures and data.json."""
    import mix

    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint

    write_tiny_checkpoint("llama3_v2_5", folder / "base")
    records = []
    for number, (width, height, words) in enumerate(_kinds()):
        file = folder / f"{number}.jpg"
        mix.photo(width, height, number).save(file, quality=90)
        turns = [
            {"role": "user", "content": "<image>\nwhat is this?"},
            {"role": "assistant", "content": " ".join(["a red car"] * (words // 3))},
        ]
        records.append({"id": str(number), "image": str(file), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def _kinds() -> list[tuple[int, int, int]]:
    """Width, height and words of the samples of all steps, a step's as they come."""
    import random

    step = [(width, height, words) for count, width, height, words in KINDS for _ in range(count)]
    chance = random.Random(0)
    return [kind for _ in range(STEPS + AHEAD) for kind in chance.sample(step, len(step))]


class Clock:
    """When every optimizer step ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def callback(self) -> Any:
        """For a Trainer."""
        from transformers import TrainerCallback

        clock = self

        class _Clock(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.ends.append(time.perf_counter())

        return _Clock()

    @property
    def rate(self) -> float:
        """Samples per second from the end of the warm steps to that of the last."""
        return RANKS * PER_RANK * (len(self.ends) - WARM) / (self.ends[-1] - self.ends[WARM - 1])


def flags(folder: Path, side: str) -> list[str]:
    """The flags of a side."""
    theirs = side.startswith("theirs")
    rows = {"per_device_train_batch_size": 1 if theirs else PER_RANK, "packing": "off" if theirs else "batch"}
    rows |= {"gradient_accumulation_steps": PER_RANK if theirs else 1, "dataloader_num_workers": 0 if theirs else 1}
    values = {
        "model_name_or_path": folder / "base", "data_path": folder / "data.json", "output_dir": folder / side,
        "deepspeed": ROOT / "ds_config_zero2.json", "max_steps": STEPS, "learning_rate": 1e-4, "report_to": "none",
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "save_strategy": "no",
        "disable_tqdm": True, "model_max_length": 2048, "check": "off", "use_cpu": True,
        "image_backend": "fast" if side == "fast" else "pillow", "gradient_checkpointing": side == "theirs", **rows,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def rank_main(folder: Path, side: str, official: Path | None) -> None:
    """One rank of one side; rank 0 prints samples per second and losses."""
    import torch
    from transformers import set_seed

    from finetune.arguments.parse import parse_arguments
    from finetune.runtime import distributed

    torch.set_num_threads(1)
    args = parse_arguments(flags(folder, side))
    distributed.start(args.training)
    set_seed(0)
    clock = Clock()
    trainer = their_trainer(args, clock, official) if side.startswith("theirs") else our_trainer(args, clock)
    trainer.train()
    if args.training.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
        print(json.dumps({"rate": clock.rate, "losses": losses}), flush=True)
    distributed.stop()


def our_trainer(args: Any, clock: Clock) -> Any:
    """As finetune.py puts it together."""
    import torch

    from dataset import make_supervised_data_module
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.encoding.encoder import Encoder
    from finetune.models import load_model, load_tokenizer
    from finetune.training.freezing import adapt
    from trainer import CPMTrainer

    base = resolve_base(args.model.model_name_or_path)
    model = adapt(load_model(base.folder, dtype=torch.float32), base.family, args.training, args.lora)
    encoder = Encoder(
        base.family,
        load_tokenizer(base.folder),
        base.settings,
        max_length=2048,
        image_backend=args.data.image_backend,
    )
    return CPMTrainer(
        model=model,
        args=args.training,
        base=base,
        part_learning_rates=dict.fromkeys(args.training.part_learning_rates, float(args.training.learning_rate)),
        callbacks=[clock.callback()],
        **make_supervised_data_module(args.data, encoder),
    )


def their_trainer(args: Any, clock: Clock, official: Path | None) -> Any:
    """The Trainer of transformers, with samples, batches and loss as published."""
    import torch
    import vendor
    from official_network import OfficialNetwork
    from official_samples import OfficialSamples, collate
    from transformers import Trainer

    from finetune.models import load_model, load_tokenizer

    folder = args.model.model_name_or_path
    records = json.loads(Path(args.data.data_path).read_text())
    tokenizer: Any = load_tokenizer(folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    samples: Any = OfficialSamples(records, tokenizer, config["query_num"], config["slice_config"]["scale_resolution"])
    if official is not None:
        samples, _ = vendor.load(official, records, tokenizer, config)
    loaded: Any = load_model(folder, dtype=torch.float32)
    model: Any = OfficialNetwork(loaded)
    return Trainer(
        model=model, args=args.training, train_dataset=samples, data_collator=collate, callbacks=[clock.callback()]
    )


def run(folder: Path, side: str, official: Path | None) -> Mapping[str, Any]:
    """One run of a side in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    command += [__file__, "--folder", str(folder), "--side", side]
    command += [] if official is None else ["--official", str(official)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"rate"')))


def main() -> None:
    """Runs the sides in turn, compares their losses and adds rows to results.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, metavar="DIR", help="the vendor's finetune folder")
    parser.add_argument("--runs", type=int, default=3, help="of each side")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        rank_main(given.folder, given.side, given.official)
        return
    from results import OFFICIAL, append

    found: dict[str, list[Mapping[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for _ in range(given.runs):
            for side in SIDES:
                found[side].append(run(Path(place), side, given.official))
                print(
                    f"{side:<12} {found[side][-1]['rate']:7.3f} samples/s  losses {_short(found[side][-1]['losses'])}"
                )
    rates = {side: statistics.median(each["rate"] for each in found[side]) for side in SIDES}
    rows = []
    for side, option in (("ours", ""), ("fast", ", --image_backend fast")):
        for other, run_again in (("theirs", ""), ("theirs_plain", ", no layer run again on either side")):
            _compare(found[side][0]["losses"], found[other][0]["losses"])
            case = f"samples per second, 2 ranks, ZeRO-2{option}{run_again}"
            if given.official is not None:
                case += f", {OFFICIAL}"
            rows.append((case, rates[side], rates[other], rates[side] / rates[other], "samples/s"))
            print(f"{case}: {rates[side]:.3f}, theirs {rates[other]:.3f}, {rows[-1][3]:.2f} times")
    if not given.dry:
        append("end_to_end", rows, ["torch", "transformers", "deepspeed", "pillow"])


def _compare(ours: Sequence[float], theirs: Sequence[float]) -> None:
    assert len(ours) == len(theirs) == STEPS, (ours, theirs)
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"losses differ by at most {apart:.1e} of them")
    assert apart < 1e-4, (ours, theirs)


def _short(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)


if __name__ == "__main__":
    main()
