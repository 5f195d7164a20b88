"""Folders in 4 bit as transformers and bitsandbytes write them; no published one was at hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from finetune.models import load_model

# What the published folders of 2.5 and 2.6 leave whole, by the public recipe that quantises them; and what 4.6 and its
# successors have in place of the resampler's layers.
PUBLISHED = ("out_proj", "kv_proj", "lm_head")
WHOLE = (*PUBLISHED, "model.merger")


def quantisation_as(skipped: Sequence[str], **settings) -> BitsAndBytesConfig:
    """4 bit as in the published folders, computing in float16."""
    published = {"bnb_4bit_compute_dtype": torch.float16, "bnb_4bit_quant_type": "nf4"}
    published |= {"bnb_4bit_use_double_quant": True, **settings}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(skipped), **published)


def write_packed(base: Path, folder: Path, skipped: Sequence[str] = WHOLE, **options) -> Path:
    """A base, quantised and saved by transformers, with the base's other files.

    Args:
        base: folder of an unquantised model.
        folder: to write.
        skipped: names of the layers that stay whole (llm_int8_skip_modules).
        options: of ``save_pretrained`` and, behind ``bnb_``, of the quantisation.
    """
    settings = {name: value for name, value in options.items() if name.startswith("bnb_")}
    saving = {name: value for name, value in options.items() if name not in settings}
    model = load_model(base, quantization_config=quantisation_as(skipped, **settings))
    model.save_pretrained(str(folder), **saving)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            shutil.copy(path, folder)
    return folder
