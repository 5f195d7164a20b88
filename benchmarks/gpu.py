"""GPU training of a MiniCPM-Llama3-V 2.5 of 8B size, this toolkit against the published scripts.

    python benchmarks/gpu.py [--method lora|full] [--layers N] [--memory] [--dry]

Random weights in bf16, one GPU, gradients and one AdamW step over 16 samples: text of some 400 tokens with a picture of
3, 9 or 10 items, 660 tokens and 4.7 items on the average. The sides run in processes of their own. Ours: rows of 4096
tokens, layers run again as --checkpoint_parts fit decides, the network's own loss. Theirs is a plain re-creation of the
published way: one sample at a time, official_network.py with float32 logits of every position, all layers run again,
with LoRA also embed_tokens, the resampler and the vision tower trained in full. Without DeepSpeed on both sides, so
that what trains is float32. The model FLOP utilisation is that of the log (finetune.training.flops), ours alone.

--memory measures the highest point of a step of LoRA with one sample of 2048 tokens and 10 items, everything run again.
--layers: of the LLM, where all of them do not fit (full). --tiny: a small network, to try this script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from accelerate.utils import send_to_device
from official_network import OfficialNetwork
from official_samples import strips
from peft import LoraConfig, get_peft_model
from results import Row, append
from torch import nn

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.batching.packing import best_fit
from finetune.encoding.collate import pack, pad
from finetune.encoding.example import Example
from finetune.families import by_name
from finetune.models import MiniCPMV, MiniCPMVConfig
from finetune.planning.recompute_choice import SHARE, fitting_parts
from finetune.planning.training_setup import SampleShape
from finetune.training.flops import Flops, flops_of
from finetune.training.freezing import adapt
from finetune.training.throughput import peak_of

SIDES = ("ours", "theirs")
# Items of a sample, and how many of 16 samples have so many: 11 web pictures, 2 large ones, 2 screenshots, a photo.
ITEMS = {3: 11, 9: 2, 10: 3}
TEXT, ANSWER, SIDE, ROW = 400, 270, 32, 4096


def config_of(layers: int | None, *, tiny: bool) -> dict[str, Any]:
    """The published config.json, or a small network of the same build."""
    config = dict(by_name("llama3_v2_5").published.config)
    if tiny:
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
        config |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        config |= {"num_key_value_heads": 2, "vocab_size": 1000, "query_num": 8}
        config["vision_config"] = {**config["vision_config"], **vision}
    return config | ({} if layers is None else {"num_hidden_layers": layers})


def example(config: dict[str, Any], items: int, length: int | None, seed: int) -> Example:
    """A random sample with one picture of so many items; ``length`` tokens in all, else ``TEXT`` beside the picture."""
    chance = torch.Generator().manual_seed(seed)
    queries, side = config["query_num"], 4 if config["hidden_size"] < 1024 else SIDE
    total = length or items * (queries + 2) + TEXT
    ids = torch.randint(3, config["vocab_size"], (total,), generator=chance)
    labels = torch.full_like(ids, -100)
    labels[-ANSWER:] = ids[-ANSWER:]
    starts = torch.arange(items) * (queries + 2) + 2
    return Example(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(total),
        patches=torch.randint(0, 256, (items * side * side, 588), dtype=torch.uint8, generator=chance),
        tgt_sizes=torch.tensor([(side, side)] * items),
        image_bound=torch.stack([starts, starts + queries], 1),
        temporal_ids=torch.full((items,), -1),
        source=f"sample {seed}",
    )


def our_batches(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Full rows."""
    lengths, items = (np.array([len(getattr(e, name)) for e in examples]) for name in ("input_ids", "tgt_sizes"))
    return [pack([examples[index] for index in row]) for row in best_fit(lengths, items, np.arange(len(lengths)), ROW)]


def their_batches(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """One sample each, pictures as normalised strips, labels moved by one."""
    batches = []
    for each in examples:
        labels = torch.cat([each.labels[1:], torch.tensor([-100])])
        text = {"input_ids": each.input_ids[None], "position_ids": each.position_ids[None], "labels": labels[None]}
        batches.append(
            text | {"pixel_values": [strips(each)], "tgt_sizes": [each.tgt_sizes], "image_bound": [each.image_bound]}
        )
    return batches


def our_model(network: MiniCPMV, given: argparse.Namespace, config: dict[str, Any], items: int) -> nn.Module:
    """Frozen, wrapped and run again in part as training does it."""
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory() as place:
        training = TrainingArguments(
            output_dir=place,
            report_to="none",
            use_cpu=device.type == "cpu",
            use_lora=given.method == "lora",
            gradient_checkpointing=True,
        )
    if device.type == "cuda" and not given.memory:
        limit = int(SHARE * torch.cuda.get_device_properties(device).total_memory)
        shape = SampleShape(tokens=ROW, items=items, labelled=ANSWER / TEXT)
        training.checkpoint_parts, _ = fitting_parts(config, training, LoraArguments(), shape, limit)
        training.gradient_checkpointing = training.checkpoint_parts != []
    model = adapt(network, network.config.family, training, LoraArguments())
    if training.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def their_model(network: MiniCPMV, method: str) -> nn.Module:
    """Everything in full, or adapters with the table, the resampler and the vision tower in full; all run again."""
    official: Any = OfficialNetwork(network).to(device=network.device, dtype=network.dtype)
    official.gradient_checkpointing_enable()
    if method == "lora":
        same = LoraArguments()
        settings = LoraConfig(
            r=same.lora_r,
            lora_alpha=same.lora_alpha,
            lora_dropout=same.lora_dropout,
            target_modules=network.config.family.lora_targets["llm"],
            modules_to_save=["embed_tokens", "resampler", "vpm"],
            task_type=None,
        )
        official = get_peft_model(official, settings)
    for parameter in official.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return official.train()


def side_main(side: str, given: argparse.Namespace) -> None:
    """One side; prints samples per second, operations per second and the highest point."""
    config, device = config_of(given.layers, tiny=given.tiny), torch.device(given.device)
    counts = [items for items, count in ITEMS.items() for _ in range(count)]
    examples = [example(config, items, None, seed) for seed, items in enumerate(counts)]
    if given.memory:
        examples = [example(config, 10, 2048, 0)]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        network = MiniCPMV(MiniCPMVConfig(**config))
    torch.set_default_dtype(torch.float32)
    batches = their_batches(examples) if side == "theirs" else our_batches(examples)
    if side == "theirs":
        model: Any = their_model(network, given.method)
        flops = None
    else:
        model = our_model(network, given, config, max(len(batch["tgt_sizes"]) for batch in batches))
        flops = flops_of(model, network.config.family)
    # Theirs has copies of the towers: the network must not stay beside them.
    del network
    batches = [send_to_device(batch, device) for batch in batches]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=device.type == "cuda")
    labelled = sum(int((each.labels >= 0).sum()) for each in examples)

    def step() -> None:
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                out = model(**batch, num_items_in_batch=labelled)
            out["loss"].backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    for _ in range(given.steps):
        step()
    wait()
    rate = given.steps * len(examples) / (time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    operations = 0.0 if flops is None else _operations(flops, examples) * rate
    print(json.dumps({"rate": rate, "operations": operations, "peak": peak}), flush=True)


def _operations(flops: Flops, examples: Sequence[Example]) -> float:
    """Of the model, per sample."""
    counts = [flops.counts(pad([each], 0)) for each in examples]
    return sum(flops.of({name: float(value) for name, value in each.items()}) for each in counts) / len(counts)


def run(side: str, words: Sequence[str]) -> dict[str, float]:
    """A side in a process of its own."""
    command = [sys.executable, __file__, *words, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"rate"')))


def main(words: Sequence[str]) -> None:
    """Runs both sides, prints and adds rows to results.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of the LLM (default: all)")
    parser.add_argument(
        "--memory", action="store_true", help="the highest point of a step with one long sample instead"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the script")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.side:
        side_main(given.side, given)
        return
    if given.device == "cpu" and not given.tiny:
        parser.error("no GPU here: this measures an 8B network on one; --tiny tries the script")
    if given.device == "cpu" and not given.dry:
        parser.error("figures of --tiny on a CPU mean nothing: add --dry")
    found = {side: run(side, words) for side in SIDES}
    name = "cpu" if given.device == "cpu" else torch.cuda.get_device_name()
    what = f"{given.method}, {given.layers or 'all'} layers"
    ours, theirs = (found[side] for side in SIDES)
    rows: list[Row] = []
    if given.memory:
        own, other = (each["peak"] / 2**30 for each in (ours, theirs))
        rows.append((f"peak memory, {what}, 2048 tokens", own, other, other / max(own, 1e-9), "GiB"))
    else:
        rates = ours["rate"], theirs["rate"]
        rows.append((f"training, {what}", *rates, rates[0] / rates[1], "samples/s"))
        peak = peak_of(name)
        share = 0.0 if peak is None else 100 * ours["operations"] / peak
        rows.append((f"model FLOP utilisation, {what}", share, 100.0, share / 100, "% of the GPU's peak"))
    for case, mine, other, ratio, unit in rows:
        print(f"{case:<48} {mine:9.4g} {other:9.4g} {ratio:6.2f}  {unit}")
    if not given.dry:
        append("gpu", rows, ("torch", "transformers", "peft"), hardware=name)


if __name__ == "__main__":
    main(sys.argv[1:])
