"""Memory estimate against measured CPU training steps: every torch allocation counted, one process per case.

    python benchmarks/plan_memory.py [CASE ...]

Prints the plan, the measurement and their ratio for the whole and for what comes and goes with a step, and adds the
former to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from results import append

from finetune.families import by_name
from finetune.planning.memory_estimate import MemoryEstimator
from finetune.planning.training_setup import SampleShape, TrainingSetup

CONFIG = {
    **by_name("v4_5").published.config,
    "head_dim": 64,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "query_num": 64,
    "vocab_size": 32000,
    "vision_config": {
        **by_name("v4_5").published.config["vision_config"],
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "num_hidden_layers": 6,
    },
}
# 4.7 with a mixture of experts: 2 of 8 see a token.
MIXTURE = {
    **by_name("v4_7").published.config,
    "image_token_id": 5,
    "insert_layer_id": 2,
    "text_config": {
        **by_name("v4_7").published.config["text_config"],
        "head_dim": 64,
        "hidden_size": 512,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 64,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 256,
        "num_attention_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {
            **by_name("v4_7").published.config["text_config"]["rope_parameters"],
            "mrope_section": [3, 3, 2],
        },
        "shared_expert_intermediate_size": 256,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        **by_name("v4_7").published.config["vision_config"],
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "num_hidden_layers": 6,
    },
}
_TEXT = SampleShape(tokens=512, items=0)
_IMAGES = SampleShape(tokens=512, items=4, patches=576)
_FULL = TrainingSetup(method="full", checkpointing=False)
_LORA = TrainingSetup(method="lora", checkpointing=False)
CASES: dict[str, tuple[TrainingSetup, SampleShape]] = {
    "full": (_FULL, _TEXT),
    "full, layers run again": (replace(_FULL, checkpointing=True), _TEXT),
    "full, 2 micro-batches": (replace(_FULL, accumulation=2), _TEXT),
    "full, images": (_FULL, _IMAGES),
    "full, images, layers run again": (replace(_FULL, checkpointing=True), _IMAGES),
    "full, vision frozen, images": (replace(_FULL, method="full-llm"), _IMAGES),
    "LoRA": (_LORA, _TEXT),
    "LoRA, layers run again": (replace(_LORA, checkpointing=True), _TEXT),
    "LoRA, images": (_LORA, _IMAGES),
    "LoRA, images, layers run again": (replace(_LORA, checkpointing=True), _IMAGES),
    "LoRA, 2 rows with images": (_LORA, replace(_IMAGES, batch=2)),
    "LoRA, many labels": (_LORA, replace(_TEXT, labelled=0.9)),
    "mixture, full": (_FULL, _TEXT),
    "mixture, full, images, layers run again": (replace(_FULL, checkpointing=True), _IMAGES),
    "mixture, LoRA, 2 rows with images": (_LORA, replace(_IMAGES, batch=2)),
}


def config_of(case: str) -> dict[str, Any]:
    """The network of a case."""
    return MIXTURE if case.startswith("mixture") else CONFIG


def alone(case: str) -> list[int]:
    """Bytes at the highest point and those of it that come and go, measured in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", case], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


def main(names: list[str], *, dry: bool = False) -> None:
    """Runs the cases and prints a line for each."""
    rows = []
    print(f"{'case':<42} {'plan':>8} {'measured':>9} {'ratio':>6} {'moving':>8} {'measured':>9} {'ratio':>6}  MB")
    for name in names or CASES:
        recipe, shape = CASES[name]
        memory = MemoryEstimator(config_of(name), torch.float32, gpu=False).memory(recipe, shape)
        ours = memory.total, memory.total - memory.weights - memory.optimizer
        theirs = alone(name)
        words = [f"{a / 1e6:8.1f} {b / 1e6:9.1f} {a / b:6.3f}" for a, b in zip(ours, theirs, strict=True)]
        print(f"{name:<42} {' '.join(words)}  {memory.when}", flush=True)
        for what, a, b in zip(("peak", "of it moving"), ours, theirs, strict=True):
            rows.append((f"{what} of a step on the CPU, {name}", a / 1e6, b / 1e6, a / b, "MB"))
    if not dry:
        append("plan_memory", rows, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"only these of: {'; '.join(CASES)}")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        from tools.measured_peak import measured

        print(*measured(config_of(given.one), *CASES[given.one]))
    else:
        main(given.cases, dry=given.dry)
