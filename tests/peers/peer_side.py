"""Runs in the environment of another tool: an adapter on its base, by that environment's classes.

``PYTHON peer_side.py BASE ADAPTER BATCH OUT``: BATCH is a safetensors file of a prompt with an image, in whose names
the kind of class shows; OUT gets the logits. ADAPTER may be "-": the base alone. Nothing of this toolkit is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.dynamic_module_utils import get_cached_module_file


def main(base: str, adapter: str, batch: str, out: str) -> None:
    """Writes the logits (1, tokens, vocabulary)."""
    tensors = load_file(batch)
    native = "image_bound" not in tensors
    model: Any = (_native if native else _published)(base)
    if adapter != "-":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    with torch.no_grad():
        logits = model(**tensors).logits if native else model(data=_data(tensors)).logits
    save_file({"logits": logits.float().contiguous()}, out)


def _native(base: str) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)


def _published(base: str) -> Any:
    # The code files beside the weights are run: the test put them there. Of a local folder transformers 4.51 copies
    # only those that the own file of the model imports, and not what these import.
    for path in sorted(Path(base).glob("*.py")):
        get_cached_module_file(base, path.name)
    return AutoModel.from_pretrained(base, trust_remote_code=True, torch_dtype=torch.float32)


def _data(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One row as the published processors make it: images are (3, 14, 14 * patches), one after another."""
    sizes = tensors["tgt_sizes"]
    images = [tensors[f"image.{index}"] for index in range(len(sizes))]
    return {
        "input_ids": tensors["input_ids"],
        "position_ids": torch.arange(tensors["input_ids"].shape[1])[None],
        "pixel_values": [images],
        "tgt_sizes": [sizes],
        "image_bound": [tensors["image_bound"]],
        "audio_features": [],
        "audio_bounds": [[]],
        "temporal_ids": None,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
