"""Training from files to weights, ours against the way of the published scripts: ``python benchmarks/end_to_end.py``.

Two ranks on the CPU, ZeRO-2, float32, the tiny MiniCPM-Llama3-V 2.5 of this tool, the same 16 samples in every
optimizer step: web pictures, documents, screenshots, small images. Ours: one row per rank (--packing batch), samples
prepared in one process per rank. Theirs is a plain re-creation of the published way: batch size 1 with 8 accumulated
batches, samples prepared by the training process as in official_samples.py, float32 logits of every position;
normalised pixels are turned back into bytes, which costs a hundredth of the step. The sides take turns; the medians of
their runs count, the first step of a run does not. The losses of all steps must agree to 1e-4. The network is so small
that preparing samples and what every micro-batch costs by itself are most of the time: that is what is compared here,
the step of a larger network is in step.py.
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

RANKS, PER_RANK, STEPS = 2, 8, 6
# Of 16 samples: how many, width, height, words of the answer.
KINDS = ((9, 640, 480, 15), (2, 1344, 1344, 40), (2, 1920, 1080, 25), (3, 448, 300, 60))
SIDES = ("ours", "theirs")


def prepare(folder: Path) -> None:
    """A base with random weights, the pictures and data.json."""
    import mix

    from finetune.commands.tiny import write_tiny_checkpoint

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
    return [kind for _ in range(STEPS) for kind in chance.sample(step, len(step))]


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
        """Samples per second from the end of the first step to that of the last."""
        return RANKS * PER_RANK * (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])


def flags(folder: Path, side: str) -> list[str]:
    """The flags of a side."""
    theirs = side == "theirs"
    rows = {"per_device_train_batch_size": 1 if theirs else PER_RANK, "packing": "off" if theirs else "batch"}
    rows |= {"gradient_accumulation_steps": PER_RANK if theirs else 1, "dataloader_num_workers": 0 if theirs else 1}
    values = {
        "model_name_or_path": folder / "base", "data_path": folder / "data.json", "output_dir": folder / side,
        "deepspeed": ROOT / "ds_config_zero2.json", "max_steps": STEPS, "learning_rate": 1e-4, "report_to": "none",
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "save_strategy": "no",
        "disable_tqdm": True, "model_max_length": 2048, "check": "off", "use_cpu": True, **rows,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def rank_main(folder: Path, side: str) -> None:
    """One rank of one side; rank 0 prints samples per second and losses."""
    import torch
    from transformers import set_seed

    from finetune import distributed
    from finetune.arguments import parse_arguments

    torch.set_num_threads(1)
    args = parse_arguments(flags(folder, side))
    distributed.start(args.training)
    set_seed(0)
    clock = Clock()
    trainer = (their_trainer if side == "theirs" else our_trainer)(args, clock)
    trainer.train()
    if args.training.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
        print(json.dumps({"rate": clock.rate, "losses": losses}), flush=True)
    distributed.stop()


def our_trainer(args: Any, clock: Clock) -> Any:
    """As finetune.py puts it together."""
    import torch

    from dataset import make_supervised_data_module
    from finetune.encoding.encoder import Encoder
    from finetune.models import load_model, load_tokenizer
    from finetune.tuning.checkpoint import resolve
    from finetune.tuning.parts import adapt
    from trainer import CPMTrainer

    base = resolve(args.model.model_name_or_path)
    model = adapt(load_model(base.folder, dtype=torch.float32), base.family, args.training, args.lora)
    encoder = Encoder.from_config(base.family, load_tokenizer(base.folder), base.settings, max_length=2048)
    return CPMTrainer(
        model=model,
        args=args.training,
        base=base,
        part_learning_rates=dict.fromkeys(args.training.part_learning_rates, float(args.training.learning_rate)),
        callbacks=[clock.callback()],
        **make_supervised_data_module(args.data, encoder),
    )


def their_trainer(args: Any, clock: Clock) -> Any:
    """The Trainer of transformers, with samples, batches and loss as published."""
    from official_samples import OfficialSamples, collate
    from transformers import Trainer

    from finetune.models import load_tokenizer

    folder = args.model.model_name_or_path
    records = json.loads(Path(args.data.data_path).read_text())
    tokenizer: Any = load_tokenizer(folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    resolution = config["slice_config"]["scale_resolution"]
    samples: Any = OfficialSamples(records, tokenizer, config["query_num"], resolution)
    model = _full_logits().from_pretrained(folder, dtype="float32")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "pos_embed" not in name
    return Trainer(
        model=model, args=args.training, train_dataset=samples, data_collator=collate, callbacks=[clock.callback()]
    )


def _full_logits() -> Any:
    """The network with float32 logits of every position and images as the published collator gives them."""
    import torch
    from torch.nn import functional as F

    from finetune.models import MiniCPMV

    class FullLogits(MiniCPMV):
        def forward(self, labels: Any, pixel_values: Any, num_items_in_batch: Any = None, **batch: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            pixels = [each for row in pixel_values for each in row]
            parts = [((each * 0.5 + 0.5) * 255).round().to(torch.uint8) for each in pixels]
            side = parts[0].shape[1]
            batch["patches"] = torch.cat([p.reshape(3, side, -1, side).permute(2, 0, 1, 3).flatten(1) for p in parts])
            batch["tgt_sizes"] = torch.cat(batch["tgt_sizes"]).long()
            bounds = [F.pad(each, (1, 0), value=row) for row, each in enumerate(batch["image_bound"])]
            batch["image_bound"] = torch.cat(bounds)
            out = super().forward(use_cache=False, **{**batch, "input_ids": batch["input_ids"].long()})
            assert out.logits is not None
            logits = out.logits.float().view(-1, out.logits.shape[-1])
            loss = F.cross_entropy(logits, labels.reshape(-1).long(), reduction="sum")
            return {"loss": loss / num_items_in_batch}

    return FullLogits


def run(folder: Path, side: str) -> Mapping[str, Any]:
    """One run of a side in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    command += [__file__, "--folder", str(folder), "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"rate"')))


def main() -> None:
    """Runs both sides in turn, compares their losses and adds a row to results.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="of each side")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        rank_main(given.folder, given.side)
        return
    from results import append

    found: dict[str, list[Mapping[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for _ in range(given.runs):
            for side in SIDES:
                found[side].append(run(Path(place), side))
                print(f"{side:<8} {found[side][-1]['rate']:7.3f} samples/s  losses {_short(found[side][-1]['losses'])}")
    pairs = list(zip(found["ours"][0]["losses"], found["theirs"][0]["losses"], strict=True))
    apart = max(abs(a - b) for a, b in pairs)
    print(f"losses differ by at most {apart:.1e}")
    assert len(pairs) == STEPS, pairs
    assert apart < 1e-4, pairs
    ours, theirs = (statistics.median(each["rate"] for each in found[side]) for side in SIDES)
    print(f"ours {ours:.3f}, theirs {theirs:.3f} samples/s, {ours / theirs:.2f} times")
    if not given.dry:
        row = ("samples per second, 2 ranks, ZeRO-2", ours, theirs, ours / theirs, "samples/s")
        append("end_to_end", [row], ["torch", "transformers", "deepspeed", "pillow"])


def _short(losses: Sequence[float]) -> str:
    return " ".join(f"{loss:.4f}" for loss in losses)


if __name__ == "__main__":
    main()
