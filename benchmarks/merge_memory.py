"""Peak memory of a merge: a random 4.5 in bfloat16 of about 1 GB, LoRA on all attention layers, resampler in full.

Ours goes through the weights layer by layer; the other way loads the model and merges it in memory (merge_and_unload).
Each runs in a process of its own, on the CPU; counted is the resident memory beyond that after a merge of a tiny
network, which has imported everything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8, "vocab_size": 8192}
TINY = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}


def resident() -> int:
    """Bytes of memory that this process has in use, pages of mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def peak(work: Callable[[], Any]) -> tuple[int, float]:
    """Bytes above the start at the worst moment, looked at every 2 ms, and seconds."""
    before, worst, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal worst
        while not done.is_set():
            worst = max(worst, resident() - before)
            time.sleep(0.002)

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    work()
    done.set()
    watcher.join()
    return worst, time.perf_counter() - start


def make(folder: Path, sizes: Mapping[str, int]) -> None:
    """A base and an adapter with random values."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig

    from finetune.families import by_name
    from finetune.models.loading import MODEL_CLASSES
    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint

    base = write_tiny_checkpoint("v4_5", folder / "base")
    settings = json.loads((base / "config.json").read_text())
    settings |= {**sizes, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    settings["torch_dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(settings))
    config = AutoConfig.from_pretrained(base)
    torch.set_default_dtype(torch.bfloat16)
    network: Any = MODEL_CLASSES[config.model_type](config)
    torch.set_default_dtype(torch.float32)
    for path in base.glob("*.safetensors"):
        path.unlink()
    side = (base / "config.json").read_bytes()
    network.save_pretrained(str(base), max_shard_size="300MB")
    (base / "config.json").write_bytes(side)
    wanted = LoraConfig(r=64, target_modules=by_name("v4_5").lora_targets["llm"], modules_to_save=["resampler"])
    model = get_peft_model(network, wanted)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.01)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)


def merge(way: str, folder: Path) -> dict[str, float]:
    """One way of merging, in this process: bytes and seconds."""
    from finetune.commands import export
    from finetune.models import load_model
    from finetune.models.adapters import put_adapter

    def ours(folder: Path) -> None:
        export.main(
            ["--model_name_or_path", str(folder / "base"), "--adapter_name_or_path", str(folder / "adapter")]
            + ["--export_dir", str(folder / "ours"), "--export_size", "0.3", "--verify", "off"]
        )

    def theirs(folder: Path) -> None:
        model: Any = put_adapter(load_model(folder / "base", dtype="auto"), folder / "adapter").merge_and_unload()  # pyright: ignore[reportArgumentType]
        model.save_pretrained(str(folder / "theirs"), max_shard_size="300MB")

    work = ours if way == "ours" else theirs
    work(folder / "tiny")
    size, seconds = peak(lambda: work(folder))
    return {"bytes": size, "seconds": seconds}


def alone(way: str, folder: Path) -> dict[str, float]:
    """``merge`` in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--way", way, "--folder", str(folder)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the folders, measures both ways and adds a row to results.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=["ours", "theirs"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"], help="of the language model")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    given = parser.parse_args(argv)
    if given.way:
        print(json.dumps(merge(given.way, given.folder)))
        return
    from results import append

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, {**SIZES, "num_hidden_layers": given.layers})
        make(folder / "tiny", TINY)
        weights = [path.stat().st_size for path in (folder / "base").glob("*.safetensors")]
        print(
            f"base       {sum(weights) / 1e9:.2f} GB in {len(weights)} files, the largest {max(weights) / 1e6:.0f} MB"
        )
        found = {}
        for way in ("ours", "theirs"):
            found[way] = alone(way, folder)
            print(f"{way:<10} {found[way]['bytes'] / 1e6:8.0f} MB  {found[way]['seconds']:6.1f} s")
        ours, theirs = found["ours"]["bytes"] / 1e6, found["theirs"]["bytes"] / 1e6
        case = f"peak memory, base of {sum(weights) / 1e9:.2f} GB, against load and merge_and_unload"
        if given.dry:
            print(f"{case}: {theirs / ours:.2f}")
            return
        append("merge_memory", [(case, ours, theirs, theirs / ours, "MB")], ["torch", "peft", "transformers"])


if __name__ == "__main__":
    main()
