"""Proof that a saved result is what was trained: loaded in a fresh process, its logits are compared."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer

import finetune
from finetune.encoding.collate import pad
from finetune.encoding.example import Example

logger = logging.getLogger(__name__)

# Logits kept per reference: the end of a sample has seen all of it.
_KEPT = 64
# Largest difference of logits, relative to their largest magnitude. 16-bit weights are rounded once more when
# they are saved, and the fresh process may run on another device.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}


def take_reference(trainer: Trainer, example: Example, pad_id: int, dtype: str, quantised: bool) -> Path | None:
    """Logits of the trained model on one example; every rank must call it (ZeRO-3 gathers).

    Returns:
        On rank 0 a safetensors file with the batch, the last logits and the dtype, alone in a temporary folder that
        only this user can read; None on the others.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(model, torch.nn.Module)
    batch = {key: value.to(trainer.args.device) for key, value in pad([example], pad_id).items()}
    labels = batch.pop("labels")
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        logits = model(**batch, logits_to_keep=min(_KEPT, labels.shape[1])).logits
    if trainer.args.process_index != 0:
        return None
    path = Path(tempfile.mkdtemp(prefix="verify-")) / "reference.safetensors"
    write_reference(path, batch, logits, dtype, quantised)
    return path


def write_reference(
    path: Path, batch: Mapping[str, torch.Tensor], logits: torch.Tensor, dtype: str, quantised: bool
) -> None:
    """Writes what ``compare`` reads: a batch, the logits (1, K, V) of its last K positions, and how they were made."""
    tensors = {key: value.cpu().contiguous() for key, value in batch.items()}
    metadata = {"dtype": dtype, "quantised": str(quantised)}
    save_file({**tensors, "logits": logits.float().cpu().contiguous()}, path, metadata=metadata)


def verify_in_fresh_process(folder: Path, reference: Path) -> int:
    """Runs ``python -m finetune verify`` from another directory, without this run's distributed environment.

    The reference holds a sample of the user's: its folder is removed, unless the check fails and it is needed again.

    Returns:
        Its exit status: 0 when the folder loads and its logits agree.
    """
    foreign = ("RANK", "LOCAL_", "WORLD_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    source = str(Path(finetune.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "finetune", "verify", str(folder), "--reference", str(reference)]
    status = subprocess.run(command, cwd=reference.parent, env=environment, check=False).returncode
    if status == 0:
        shutil.rmtree(reference.parent)
    else:
        logger.error("to check again: %s", shlex.join(["python", *command[1:]]))
    return status


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a loaded model is from its reference.

    Attributes:
        difference: largest absolute difference of logits.
        relative: the same over the largest magnitude of the reference.
        tolerance: largest relative difference allowed.
        base_difference: largest absolute difference with the adapter off; None for a full model.
    """

    difference: float
    relative: float
    tolerance: float
    base_difference: float | None

    @property
    def ok(self) -> bool:
        """Whether the loaded model is the trained one."""
        return self.relative <= self.tolerance


def compare(model: torch.nn.Module, reference: Path) -> Comparison:
    """Runs the reference's batch through a loaded model."""
    from peft import PeftModel

    tensors = load_file(reference)
    expected = tensors.pop("logits")
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in tensors.items()}
    with torch.no_grad():
        difference = _distance(model, batch, expected)
        base = None
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                base = _distance(model, batch, expected)
    relative = difference / max(expected.abs().max().item(), 1e-6)
    return Comparison(difference, relative, TOLERANCES[reference_settings(reference)[0]], base)


def reference_settings(reference: Path) -> tuple[str, bool]:
    """The dtype the reference was computed in, e.g. "bfloat16", and whether the base was quantised (QLoRA)."""
    with safe_open(reference, framework="pt") as file:
        metadata = file.metadata()
    return metadata["dtype"], metadata["quantised"] == "True"


def _distance(model: torch.nn.Module, batch: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
    keep = expected.shape[1]
    # The classes of transformers (4.6, 4.7, OCR) give all logits whatever is asked for.
    logits = model(**batch, logits_to_keep=keep).logits[:, -keep:]
    return (logits.float().cpu() - expected).abs().max().item()
