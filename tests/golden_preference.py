"""Computes tests/golden/preference.json with TRL 1.16: losses and rewards of pairs by its own trainers' methods.

``pip install trl==1.16.0`` in an environment of its own, then ``python tests/golden_preference.py``. The loss of
DPOTrainer has no public method that takes log-probabilities; here it gets a model that returns them.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

GOLDEN = Path(__file__).parent / "golden" / "preference.json"
PAIRS = 6


def pairs() -> list[dict[str, Any]]:
    """Log-probabilities of the tokens of both answers, and their sums by a reference."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(PAIRS):
        lengths = torch.randint(1, 9, (2,), generator=draw).tolist()
        tokens = [(-3 * torch.rand(length, generator=draw)).tolist() for length in lengths]
        reference = (torch.tensor([sum(each) for each in tokens]) + 4 * torch.randn(2, generator=draw)).tolist()
        found.append({"chosen": tokens[0], "rejected": tokens[1], "reference": reference})
    return found


def dpo(pair: dict[str, Any], loss: str, beta: float) -> dict[str, float]:
    """What TRL's DPOTrainer computes for a batch of one pair."""
    length = max(len(pair["chosen"]), len(pair["rejected"]))
    mask = torch.zeros(2, length + 1, dtype=torch.int64)
    logps = torch.zeros(2, length)
    for row, name in enumerate(("chosen", "rejected")):
        mask[row, 1 : 1 + len(pair[name])] = 1
        logps[row, : len(pair[name])] = torch.tensor(pair[name])
    zeros = torch.zeros(2, length)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    reference = torch.tensor(pair["reference"])
    inputs = {
        "input_ids": torch.zeros(2, length + 1, dtype=torch.int64),
        "attention_mask": torch.ones(2, length + 1, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    same = lambda value: value  # noqa: E731
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    value = _class("trl", "DPOTrainer")._compute_loss(trainer, lambda **_: outputs, inputs, False)
    logged = trainer._metrics["train"]
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    return {"loss": float(value), **{name: logged[name][0] for name in names}}


def cpo(pair: dict[str, Any], loss: str, beta: float, smoothing: float, gamma: float) -> dict[str, float]:
    """What TRL's CPOTrainer computes: simpo of mean log-probabilities, sigmoid of log-ratios with label smoothing."""
    values = [torch.tensor([sum(pair[name])]) for name in ("chosen", "rejected")]
    if loss == "simpo":
        values = [value / len(pair[name]) for value, name in zip(values, ("chosen", "rejected"), strict=True)]
    else:
        values = [value - reference for value, reference in zip(values, pair["reference"], strict=True)]
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(accelerator=accelerator, beta=beta, label_smoothing=smoothing, alpha=0.0)
    trainer.loss_type, trainer.simpo_gamma = loss, gamma
    losses, better, worse = _class("trl.experimental.cpo", "CPOTrainer").cpo_loss(trainer, *values)
    return {"loss": float(losses), "rewards/chosen": float(better), "rewards/rejected": float(worse)}


def orpo(pair: dict[str, Any], beta: float) -> dict[str, float]:
    """TRL's ORPOTrainer, whose loss is the likelihood of the better answer minus this."""
    values = [torch.tensor([sum(pair[name]) / len(pair[name])]) for name in ("chosen", "rejected")]
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), beta=beta)
    losses, better, worse, *_ = _class("trl.experimental.orpo", "ORPOTrainer").odds_ratio_loss(trainer, *values)
    return {"odds": float(losses), "rewards/chosen": float(better), "rewards/rejected": float(worse)}


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)  # not installed with the other tests


def main() -> None:
    """Writes the file."""
    given = pairs()
    cases = []
    for beta in (0.1, 0.5):
        for loss in ("sigmoid", "hinge", "ipo"):
            cases.append({"loss": loss, "beta": beta, "figures": [dpo(pair, loss, beta) for pair in given]})
        smoothed = [cpo(pair, "sigmoid", beta, 0.2, 0.0) for pair in given]
        cases.append({"loss": "sigmoid", "beta": beta, "label_smoothing": 0.2, "figures": smoothed})
        margins = [cpo(pair, "simpo", beta, 0.0, 0.5) for pair in given]
        cases.append({"loss": "simpo", "beta": beta, "gamma": 0.5, "figures": margins})
        cases.append({"loss": "orpo", "beta": beta, "figures": [orpo(pair, beta) for pair in given]})
    GOLDEN.write_text(json.dumps({"trl": metadata.version("trl"), "pairs": given, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
