"""Builds trainer, model and data from flags as finetune.py does, without output folder and verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed
from variants import VARIANTS

from dataset import make_supervised_data_module
from finetune.arguments.parse import parse_arguments
from finetune.arguments.preference import options_of
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.run_identity import reference_key
from finetune.encoding.encoder import Encoder
from finetune.models import load_model, load_tokenizer
from finetune.runtime import distributed
from finetune.runtime.imports import optional_libraries_hidden
from finetune.training.freezing import adapt
from finetune.training.gradient_norms import PREFIX
from preference_trainer import PreferenceTrainer
from trainer import CPMTrainer

RATE = 2e-4
QUIET = (
    *("--dataloader_num_workers", "0", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"),
    *("--train_sampling_strategy", "sequential", "--lr_scheduler_type", "constant", "--learning_rate", str(RATE)),
    *("--max_slice_nums", "4", "--lora_dropout", "0"),
)
LORA = ("--use_lora", "true", "--lora_r", "8", "--tune_vision", "true")
# Those that every mode is tried on; the other generations are compared in fewer steps and modes.
FAMILIES = ("v2_0", "llama3_v2_5")
OTHERS = tuple(name for name in VARIANTS if name not in FAMILIES)
KINDS = {"full": (), "lora": LORA}
# Preference training, with both kinds of reference.
PAIRED = {"dpo": ("--stage", "dpo"), "dpolora": (*LORA, "--stage", "dpo", "--pref_reference", "adapter_off")}
# Adapters on the experts of a mixture and on its routers too.
EXPERTS = (*LORA, "--lora_target_parameters", "experts.gate_up_proj,experts.down_proj,mlp.gate.weight")


@dataclass(frozen=True)
class Step:
    """What the log says about one optimizer step."""

    loss: float
    grad_norm: float
    parts: dict[str, float]


def flags(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    """The flags of a run on the records of a folder."""
    paths = ("--model_name_or_path", str(base), "--output_dir", str(output))
    return [*paths, "--data_path", str(data / "train.json"), "--eval_data_path", str(data / "eval.json"), *QUIET, *more]


def build(argv: Sequence[str]) -> CPMTrainer:
    """The trainer of some flags, in the order of finetune.py."""
    args = parse_arguments(argv)
    base = resolve_base(args.model.model_name_or_path)
    distributed.start(args.training)
    set_seed(0)
    tokenizer = load_tokenizer(base.folder)
    model = load_model(base.folder, dtype=torch.float32)
    with optional_libraries_hidden():
        model = adapt(model, base.family, args.training, args.lora)
    encoder = Encoder(base.family, tokenizer, base.settings, max_slice_nums=args.data.max_slice_nums)
    rates = args.training.part_learning_rates
    data = make_supervised_data_module(args.data, encoder)
    made = partial(
        PreferenceTrainer,
        preference=options_of(args.training),
        reference_key=reference_key(args, base),
        base_is_start=args.training.use_lora,
    )
    of_stage = CPMTrainer if args.data.stage == "sft" else made
    return of_stage(model=model, args=args.training, base=base, part_learning_rates=rates, **data)


def steps(trainer: CPMTrainer) -> list[Step]:
    """Loss and gradient norms of every step that was logged."""
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    parts = [{name: norm for name, norm in entry.items() if name.startswith(PREFIX)} for entry in logs]
    return [Step(entry["loss"], float(entry["grad_norm"]), own) for entry, own in zip(logs, parts, strict=True)]


def unwrapped(trainer: CPMTrainer) -> nn.Module:
    """The model without wrappers."""
    assert isinstance(trainer.model, nn.Module)
    return trainer.model


def trained(trainer: CPMTrainer) -> dict[str, torch.Tensor]:
    """Copies of the trained weights."""
    return {n: p.detach().clone() for n, p in unwrapped(trainer).named_parameters() if p.requires_grad}


def near(ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether weights after the same steps of Adam are the same.

    Adam turns rounding where a gradient is nearly zero into a step of the learning rate's size: single weights may be
    one step apart, all together not a tenth of one. A part that learnt otherwise would be several steps apart.
    """
    difference = (ours.float() - other.float()).abs()
    return float(difference.max()) <= RATE and float(difference.mean()) <= RATE / 10
