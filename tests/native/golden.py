"""Golden figures of 4.6, 4.7 and OCR: ids, pixels, loss and gradients by the processor and the class of transformers.

``python tests/native/golden.py v4_7`` records those of a family with the installed version, without a name those of
all; nothing of the toolkit computes there.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "native"
FAMILIES = ("v4_6", "v4_7", "ocr1_0")
CASES = ("text", "system", "whole", "several")
SCALE = 0.1


def fill(model: torch.nn.Module) -> None:
    """Gives every weight values that depend on its name alone: no version of torch draws them otherwise."""
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the embeddings
            values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=tuple(tensor.shape))
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(torch.from_numpy(around + SCALE * values))


def moments(values: torch.Tensor) -> list[float]:
    """Sum, sum of squares, and the sum weighted by position, which sees the order."""
    flat = values.detach().double().flatten()
    place = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
    return [flat.sum().item(), flat.square().sum().item(), (flat * place).sum().item()]


def _case(folder: Path, model: Any, name: str) -> dict[str, Any]:
    from conversations import CONVERSATIONS, as_published

    processor = transformers.AutoProcessor.from_pretrained(folder)
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = as_published(CONVERSATIONS[name])
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    batch = dict(processor.apply_chat_template(messages, **options))
    ids = batch["input_ids"]
    labels = ids.clone()
    labels[:, : prompt["input_ids"].shape[1]] = -100
    labels[:, -1] = -100  # the line break behind the end mark
    model.zero_grad()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    gradients = {
        part: sum(
            weight.grad.double().square().sum().item()
            for key, weight in model.named_parameters()
            if key.startswith(part) and weight.grad is not None
        )
        ** 0.5
        for part in ("model.vision_tower", "model.merger", "model.language_model")
    }
    images = {}
    if "pixel_values" in batch:
        images = {"target_sizes": batch["target_sizes"].tolist(), "pixels": moments(batch["pixel_values"])}
    return {
        "prompt": prompt["input_ids"][0].tolist(),
        "ids": ids[0].tolist(),
        "labels": labels[0].tolist(),
        **images,
        "loss": loss.item(),
        "gradients": gradients,
    }


def record(*families: str) -> None:
    """Writes the folders and the figures of these families."""
    from finetune.families import by_name
    from finetune.tiny.native_folders import write_native

    for family in families:
        folder = GOLDEN / family
        folder.mkdir(parents=True, exist_ok=True)
        write_native(by_name(family), folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        fill(model)
        figures = {
            "versions": {"transformers": transformers.__version__, "torch": str(torch.__version__)},
            "cases": {name: _case(folder, model, name) for name in CASES},
        }
        lines = json.dumps(figures, separators=(",", ":")).replace('"},"', '"},\n"').replace(',"', ',\n"')
        (folder / "golden.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "native")]
    torch.set_num_threads(1)
    record(*(sys.argv[1:] or FAMILIES))
