"""Export for vLLM: which LoRA layers it can load, and the adapter with these; the rest is merged into the base.

vLLM loads LoRA of the language model's linear layers with one rank and one scale, no modules saved in full and no DoRA;
see docs/export.md, with versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from finetune.checkpoints.base_checkpoint import SIDE_FILES, BaseCheckpoint, copy_base_files
from finetune.export.lora_merge import MergedTensors
from finetune.families.family import Family
from finetune.models.adapters import ADAPTER_PREFIX, ADAPTER_WEIGHTS
from finetune.utils.errors import CheckpointError

_NOT_LINEAR = ("embed_tokens", "lm_head")
# Values of vLLM's --max-lora-rank.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def max_lora_rank(rank: int) -> int:
    """The value of vLLM's --max-lora-rank for an adapter.

    Raises:
        CheckpointError: the rank is too large for vLLM.
    """
    if rank > _RANKS[-1]:
        raise CheckpointError(f"the adapter has rank {rank}, vLLM takes at most {_RANKS[-1]}: export without --format")
    return next(most for most in _RANKS if most >= rank)


def stays(family: Family) -> Callable[[str], bool]:
    """Whether the LoRA of a module stays in the adapter: linear layers of the LLM but embeddings and output layer."""
    inside = tuple(f"{part}." for part in family.parts["llm"])
    return lambda name: name.startswith(inside) and name.rpartition(".")[2] not in _NOT_LINEAR


def check_servable(folder: Path, config: LoraConfig) -> None:
    """Refuses adapters that vLLM cannot serve.

    Raises:
        CheckpointError: with what to do instead.
    """
    merge = "merge it completely: export without --format vllm, the result needs no adapter"
    if config.use_dora:
        raise CheckpointError(f"{folder} is a DoRA adapter, which vLLM refuses; {merge}")
    if config.lora_bias:
        raise CheckpointError(f"{folder} has biases in its LoRA (lora_bias), which vLLM refuses; {merge}")


def write_served_adapter(folder: Path, merged: MergedTensors, base: BaseCheckpoint, base_name: str) -> int:
    """Writes the adapter with the layers that were not merged; returns its rank, for vLLM's --max-lora-rank.

    vLLM supports one rank and one scale: smaller ranks are padded with zeros, other scales are multiplied into B.

    Args:
        folder: an empty folder.
        merged: has the layers that were not merged.
        base: for the tokenizer and the auto_mapping.
        base_name: recorded as the base of the adapter.

    Raises:
        CheckpointError: all layers were merged.
    """
    if not merged.kept:
        raise CheckpointError(
            "the adapter has no LoRA in the language model: export without --format vllm, the result needs no adapter"
        )
    ranks = {name: layer.r["default"] for name, layer in merged.kept.items()}
    scales = {name: layer.scaling["default"] for name, layer in merged.kept.items()}
    rank = max(ranks.values())
    # A common scale is kept if alpha is an integer, as peft and vLLM require.
    alpha = next(iter(scales.values())) * rank
    even = len(set(ranks.values())) == len(set(scales.values())) == 1 and alpha == round(alpha)
    common = alpha / rank if even else 1.0
    config = LoraConfig(
        r=rank,
        lora_alpha=round(common * rank),
        target_modules=sorted(merged.kept),
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    loader, library = base.family.auto_mapping
    config.auto_mapping = {"base_model_class": loader, "parent_library": library, **base.auto_mapping_extra}
    config.save_pretrained(str(folder))
    save_file(
        _tensors(merged, rank, {name: scale / common for name, scale in scales.items()}), folder / ADAPTER_WEIGHTS
    )
    copy_base_files(base, folder, SIDE_FILES)
    (folder / "README.md").write_text(
        f"---\nbase_model: {base_name}\nlibrary_name: peft\n---\n# LoRA adapter of the language model alone\n\n"
        f"For `{base_name}`, which has everything else that was trained. Not for the published base.\n",
        encoding="utf-8",
    )
    # safetensors writes files with mode 0600, regardless of the umask.
    (folder / ADAPTER_WEIGHTS).chmod((folder / "README.md").stat().st_mode & 0o777)
    return rank


def _tensors(merged: MergedTensors, rank: int, factors: Mapping[str, float]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, factor in factors.items():
        a, b = (merged.adapter_tensor(name, f"lora_{side}.weight") for side in "AB")
        missing = rank - len(a)
        if missing:
            a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
            b = torch.cat([b, b.new_zeros(len(b), missing)], dim=1)
        tensors[f"{ADAPTER_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{ADAPTER_PREFIX}{name}.lora_B.weight"] = (b if factor == 1 else b * factor).contiguous()
    return tensors
