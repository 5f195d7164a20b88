"""Compares our networks with figures recorded from the official code: one result per case."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from parity_result import Result
from safetensors.torch import load_file

from finetune.families import UnknownFamilyError, detect
from finetune.models import CheckpointError, MiniCPMV, load_model

ABSOLUTE = 1e-4
LOSS = 1e-5
GRAD_NORM = 1e-3
GRAD_FLOOR = 1e-6


def to_patches(image: torch.Tensor, side: int = 14) -> torch.Tensor:
    """A (3, H, W) uint8 image as (patches, 3*side*side) rows in (channel, row, column) order."""
    channels, height, width = image.shape
    grid = image.reshape(channels, height // side, side, width // side, side)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * side * side)


def batch_of(tensors: dict[str, torch.Tensor], case: dict) -> dict[str, torch.Tensor]:
    """The batch contract for a recorded case, without labels."""
    index = case["index"]
    batch = {"input_ids": tensors[f"{index}.input_ids"].to(torch.int64)[None]}
    sizes = tensors[f"{index}.tgt_sizes"].to(torch.int64).reshape(-1, 2)
    if len(sizes):
        batch["patches"] = torch.cat([to_patches(tensors[f"{index}.image.{j}"]) for j in range(len(sizes))])
        batch["tgt_sizes"] = sizes
        batch["image_bound"] = _in_row_0(tensors[f"{index}.image_bound"])
        groups = case.get("temporal_ids") or [[-1]] * len(sizes)
        batch["temporal_ids"] = torch.tensor([time for group in groups for time in group])
        batch["group_sizes"] = torch.tensor([len(group) for group in groups])
    if f"{index}.audio_bound" in tensors:
        batch["audio_bound"] = _in_row_0(tensors[f"{index}.audio_bound"])
        clips = [tensors[f"{index}.mel.{j}"].T for j in range(len(batch["audio_bound"]))]
        batch["audio_features"] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).transpose(1, 2)
        batch["audio_lengths"] = torch.tensor([len(clip) for clip in clips])
    return batch


def _in_row_0(bounds: torch.Tensor) -> torch.Tensor:
    bounds = bounds.to(torch.int64).reshape(-1, 2)
    return torch.cat([torch.zeros(len(bounds), 1, dtype=torch.int64), bounds], dim=1)


def check_folder(folder: Path) -> Iterator[Result]:
    """One result per case of a folder with config.json, model.safetensors, cases.safetensors and cases.json."""
    label = folder.name
    try:
        detect(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
        tensors = load_file(folder / "cases.safetensors")
        model = load_model(folder, dtype=torch.float32, tokenizer_required=False)
    except (OSError, UnknownFamilyError, CheckpointError) as error:
        yield Result(label, False, f"{type(error).__name__}: {error}")
        return
    assert isinstance(model, MiniCPMV)
    for case in cases:
        name = f"{label} case {case['index']}"
        try:
            yield _check_case(model, tensors, case, name)
        except (ValueError, KeyError, RuntimeError) as error:
            yield Result(name, False, f"{type(error).__name__}: {error}")


def _check_case(model: MiniCPMV, tensors: dict[str, torch.Tensor], case: dict, name: str) -> Result:
    index = case["index"]
    batch = batch_of(tensors, case)
    with torch.no_grad():
        logits = _difference(model(**batch).logits[0], tensors[f"{index}.expected.logits"])
        vision = 0.0
        if "patches" in batch:
            names = ("patches", "tgt_sizes", "temporal_ids", "group_sizes")
            embeds = model.get_image_features(*(batch[name] for name in names))
            vision = _difference(embeds, tensors[f"{index}.expected.vision_embeds"])
    labels = tensors[f"{index}.labels"].to(torch.int64)[None]
    model.zero_grad()
    output = model(**batch, labels=labels)
    output.loss.backward()
    loss = abs(output.loss.item() - case["loss"])
    parameters = dict(model.named_parameters())
    excess, worst = 0.0, 0.0
    for key, expected in case["grad_norms"].items():
        grad = parameters[key].grad
        difference = abs((0.0 if grad is None else grad.norm().item()) - expected)
        excess = max(excess, difference - GRAD_NORM * max(expected, GRAD_FLOOR))
        worst = max(worst, difference / max(expected, GRAD_FLOOR))
    ok = logits <= ABSOLUTE and vision <= ABSOLUTE and loss <= LOSS and excess <= 0
    detail = f"logits {logits:.1e} vision {vision:.1e} loss {loss:.1e} grad norms {worst:.1e}"
    return Result(name, ok, f"{detail} ({len(case['grad_norms'])} norms)")


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference; infinite when the shapes differ or a value is not finite."""
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return float("inf")
    return (ours - theirs).abs().max().item() if ours.numel() else 0.0
