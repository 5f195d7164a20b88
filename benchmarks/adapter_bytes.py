"""Size of a LoRA checkpoint of MiniCPM-Llama3-V 2.5: the toolkit's defaults against those of the published scripts.

    python benchmarks/adapter_bytes.py [--dry]

The network is built on the meta device in its published size and adapted as training adapts it; what is saved is
counted from shapes and types, 16 bit as DeepSpeed trains it, on both sides. Theirs is a re-creation of the published
choice: adapters of the same rank on the same layers of the language model, embed_tokens and resampler in full, and with
tune_vision (the default of the published launcher) vpm as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from results import Row, append
from torch import nn

from finetune.families import by_name, detect
from finetune.planning.meta_model import build_meta_model, prepare_meta_model
from finetune.planning.training_setup import TrainingSetup

CONFIG = by_name("llama3_v2_5").published.config
RANK = 64
_TABLE, _RESAMPLER, _VISION = "embed_tokens", "resampler", "vpm"


def saved(model: nn.Module) -> int:
    """Bytes of what trains, which is what an adapter folder holds."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def ours(*, resampler: bool) -> int:
    """The toolkit's adapters; by default the resampler trains in full beside them."""
    return saved(
        prepare_meta_model(CONFIG, TrainingSetup(stage=2, lora_r=RANK, tune_resampler=None if resampler else False))
    )


def theirs(*modules: str) -> int:
    """The published adapters with modules in full."""
    settings = LoraConfig(
        r=RANK, target_modules=detect(CONFIG).lora_targets["llm"], modules_to_save=list(modules), task_type=None
    )
    with torch.device("meta"):
        model = get_peft_model(build_meta_model(CONFIG), settings)  # pyright: ignore[reportArgumentType]
    return saved(model.to(torch.bfloat16))


def main(*, dry: bool) -> None:
    """Prints the cases and adds them to results.csv."""
    default, bare = ours(resampler=True), ours(resampler=False)
    launcher, frozen = theirs(_TABLE, _RESAMPLER, _VISION), theirs(_TABLE, _RESAMPLER)
    rows: list[Row] = []
    for case, mine, other in (
        ("LoRA checkpoint, same LLM targets", default, launcher),
        ("LoRA checkpoint, same LLM targets, vision frozen on both sides", default, frozen),
        ("LoRA checkpoint, adapters alone (tune_resampler false)", bare, launcher),
        ("LoRA checkpoint, adapters alone, vision frozen on both sides", bare, frozen),
    ):
        rows.append((case, mine / 1e6, other / 1e6, other / mine, "MB, theirs / ours"))
        print(f"{case:<64} {mine / 1e6:8.1f} {other / 1e6:8.1f} {other / mine:6.2f}")
    if not dry:
        append("adapter_bytes", rows, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    main(dry=parser.parse_args().dry)
