"""Run by vLLM's interpreter: lets vLLM read adapters as its server does, and prints what it says to each as JSON."""

from __future__ import annotations

import json
import sys

from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def said(folder: str, max_rank: int) -> dict[str, object]:
    """What vLLM makes of an adapter: ranks and scales of its layers, or the error."""
    try:
        helper = PEFTHelper.from_local_dir(folder, None)
        helper.validate_legal(LoRAConfig(max_lora_rank=max_rank))
        model = LoRAModel.from_local_checkpoint(folder, LINEAR, helper, device="cpu")
    except (ValueError, RuntimeError, TypeError) as error:
        return {"error": str(error)}
    layers = model.loras.values()
    return {"ranks": sorted({each.rank for each in layers}), "scales": sorted({each.scaling for each in layers})}


print("\n" + json.dumps([said(folder, int(rank)) for folder, rank in zip(sys.argv[1::2], sys.argv[2::2], strict=True)]))
