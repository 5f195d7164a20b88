"""Adapters with random values on tiny networks, made by peft without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from variants import MIXTURE, family_of

from finetune.models import load_model

# Module of the resampler, by its whole name where another ends alike.
RESAMPLERS = {"v4_6": "model.merger", "v4_7": "model.merger", MIXTURE: "model.merger"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def targets(family: str) -> str:
    """Every layer that the family puts adapters on."""
    return "|".join(family_of(family).lora_targets.values())


def make_adapter(base: Path, family: str, seed: int = 0, **options: Any) -> PeftModel:
    """LoRA on all parts of a network, every trained value moved away from its start."""
    network: Any = load_model(base)
    model = get_peft_model(network, LoraConfig(**{"r": 2, "target_modules": targets(family), **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    assert isinstance(model, PeftModel)
    return model.eval()


def save(model: PeftModel, folder: Path) -> Path:
    """Saves an adapter as training does: nothing of the base's embeddings."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
