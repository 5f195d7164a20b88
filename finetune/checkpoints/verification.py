"""Verifies a saved result: loads it in a fresh process and compares logits and trained weights with the model."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer

import finetune
from finetune.checkpoints.adapter_effect import no_effect
from finetune.checkpoints.logit_tolerance import FLOAT32, computing_noise, round_weights
from finetune.checkpoints.weight_hashes import fingerprints, trained_names
from finetune.encoding.collate import pad
from finetune.encoding.example import Example
from finetune.runtime.outcome import NOT_VERIFIED, OK, UNUSABLE_RESULT
from finetune.runtime.processes import ABOVE
from finetune.runtime.waiting_process import WaitingProcess
from finetune.utils.number_format import significant

logger = logging.getLogger(__name__)

# Positions at the end of the sample whose logits are kept: they depend on all of it.
_KEPT = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """How the logits of a reference were made.

    Attributes:
        dtype: in which the result is loaded, e.g. "bfloat16".
        quantised: whether the base is in 4 bit (QLoRA).
        rounding: largest absolute change of these logits when the trained model is cast to ``dtype``.
        noise: largest absolute change when every layer's output is rounded once more; 0 in float32.
        trained: fingerprints of the trained parameters, by name.
    """

    dtype: str
    quantised: bool = False
    rounding: float = 0.0
    noise: float = 0.0
    trained: Mapping[str, str] = field(default_factory=dict)


def take_reference(trainer: Trainer, example: Example, pad_id: int, dtype: str, quantised: bool) -> Path | None:
    """Logits of the trained model on one example; every rank must call it (ZeRO-3 gathers).

    Nothing else may use the model afterwards: its float32 weights are cast to ``dtype`` in place, to measure how that
    changes the logits.

    Returns:
        On rank 0 a safetensors file with the batch, the last logits and their origin, alone in a temporary folder that
        only this user can read; None on the others.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    batch = {key: value.to(trainer.args.device) for key, value in pad([example], pad_id).items()}
    labels = batch.pop("labels")
    first, kind = trainer.args.process_index == 0, getattr(torch, dtype)
    trained = fingerprints(model, trained_names(model), kind, wanted=first)

    def compute_logits() -> torch.Tensor:
        return model(**batch, logits_to_keep=min(_KEPT, labels.shape[1])).logits.float()

    model.eval()
    rounding = noise = 0.0
    with torch.no_grad():
        with trainer.accelerator.autocast():
            logits = compute_logits()
        if kind != torch.float32:
            round_weights(model, kind)
            rounded = compute_logits()
            rounding = (rounded - logits).abs().max().item()
            noise = computing_noise(model, compute_logits, rounded)
    if not first:
        return None
    path = Path(tempfile.mkdtemp(prefix="verify-")) / "reference.safetensors"
    write_reference(path, batch, logits, Origin(dtype, quantised, rounding, noise, trained))
    return path


def write_reference(path: Path, batch: Mapping[str, torch.Tensor], logits: torch.Tensor, origin: Origin) -> None:
    """Writes the reference for ``compare``: a batch, the logits (1, K, V) of its last K positions, and their origin."""
    tensors = {key: value.cpu().contiguous() for key, value in batch.items()}
    metadata = {"origin": json.dumps(asdict(origin))}
    save_file({**tensors, "logits": logits.float().cpu().contiguous()}, path, metadata=metadata)


def verify_in_fresh_process(folder: Path, reference: Path, waiting: WaitingProcess | None = None) -> int:
    """Runs ``python -m finetune verify`` from another directory, without this run's distributed environment.

    The reference contains a sample of the user's data: its folder is removed unless the verification fails.

    Args:
        folder: of the result.
        reference: as ``take_reference`` wrote it.
        waiting: a process from before the run that has its imports already; None to start one.

    Returns:
        OK; UNUSABLE_RESULT for an adapter that changes nothing; NOT_VERIFIED if the folder does not load, or its logits
        differ.
    """
    distributed = ("RANK", "LOCAL_", "WORLD_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(distributed)}
    source = str(Path(finetune.__file__).resolve().parent.parent)
    environment[ABOVE] = str(os.getpid())
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH", "")]))
    words = ["verify", str(folder), "--reference", str(reference)]
    if waiting is None:
        command = [sys.executable, "-m", "finetune", *words]
        status = subprocess.run(command, cwd=reference.parent, env=environment, check=False).returncode
    else:
        status = waiting.call(words, reference.parent, environment)
    if status in (OK, UNUSABLE_RESULT):
        shutil.rmtree(reference.parent)
        return status
    logger.error("to repeat the verification: %s", shlex.join(["python", "-m", "finetune", *words]))
    return NOT_VERIFIED


@dataclass(frozen=True, slots=True)
class LogitComparison:
    """How far a loaded model is from its reference.

    Attributes:
        difference: largest absolute difference of logits.
        largest: largest absolute logit of the reference.
        wrong: names of the trained parameters whose values differ.
        base_difference: largest absolute difference with the adapter off; None for a full model.
        origin: of the reference.
        no_effect: why the adapter changes nothing; None if it does.
    """

    difference: float
    largest: float
    wrong: list[str]
    base_difference: float | None
    origin: Origin
    no_effect: str | None = None

    @property
    def relative(self) -> float:
        """The difference over the largest logit."""
        return self.difference / self.largest

    @property
    def tolerance(self) -> float:
        """Largest relative difference allowed: the effect of the cast, and the rounding noise of both computations."""
        return max((self.origin.rounding + 2 * self.origin.noise) / self.largest, FLOAT32)

    @property
    def ok(self) -> bool:
        """Whether the loaded model is the trained one."""
        return not self.wrong and self.relative <= self.tolerance

    def reasons(self) -> str:
        """Where the tolerance comes from, and how many trained tensors are equal, for messages."""
        origin, same = self.origin, len(self.origin.trained) - len(self.wrong)
        equal = f"{same} of {len(origin.trained)} trained tensors and scales are equal"
        if origin.dtype == "float32":
            return f"tolerance: {significant(FLOAT32)} of the largest logit, for other kernels in float32; {equal}"
        rounding, noise = (significant(each / self.largest, 2) for each in (origin.rounding, origin.noise))
        return (
            f"tolerance: rounding the trained model to {origin.dtype} moves these logits by {rounding} of the "
            f"largest, one more rounding in every layer by {noise}, here and in the new process; {equal}"
        )


def compare(model: torch.nn.Module, reference: Path) -> LogitComparison:
    """Runs the reference's batch through a loaded model; compares logits and fingerprints of trained parameters."""
    from peft import PeftModel

    tensors, origin = load_file(reference), origin_of(reference)
    expected = tensors.pop("logits")
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in tensors.items()}
    found = fingerprints(model, list(origin.trained), getattr(torch, origin.dtype))
    wrong = [name for name, value in origin.trained.items() if found.get(name) != value]
    with torch.no_grad():
        difference = _distance(model, batch, expected)
        base = None
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                base = _distance(model, batch, expected)
    largest = max(expected.abs().max().item(), 1e-6)
    return LogitComparison(difference, largest, wrong, base, origin, no_effect(model, base))


def origin_of(reference: Path) -> Origin:
    """How the logits of a reference were made."""
    with safe_open(reference, framework="pt") as file:
        return Origin(**json.loads(file.metadata()["origin"]))


def _distance(model: torch.nn.Module, batch: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
    keep = expected.shape[1]
    # A model may return the logits of all positions.
    logits = model(**batch, logits_to_keep=keep).logits[:, -keep:]
    return (logits.float().cpu() - expected).abs().max().item()
