"""Measured peak memory of a CPU training step, to validate the memory estimate."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, set_seed

from finetune.arguments.activation_checkpointing import set_checkpointing
from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.families import detect
from finetune.families.common import vocab_size
from finetune.models.loading import MODEL_CLASSES
from finetune.planning.training_setup import SampleShape, TrainingSetup
from finetune.training.freezing import adapt


def measured(
    config: dict[str, Any], recipe: TrainingSetup, shape: SampleShape, lora: LoraArguments | None = None
) -> tuple[int, int]:
    """Peak memory in bytes of the second training step of a randomly initialised model, in fp32.

    Args:
        config: config.json of a small model.
        recipe: stage 0 and one process.
        shape: of the micro-batch.
        lora: how adapters are made; None for those of the recipe's rank.

    Returns:
        All bytes, and the transient part of them (gradients, activations, logits).
    """
    set_seed(0)
    network = MODEL_CLASSES[config["model_type"]]
    settings: Any = network.config_class
    model: Any = network(settings(**config))
    family = detect(config)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(output_dir=folder, use_cpu=True, report_to="none", **recipe.training_flags())
        if recipe.checkpointing and recipe.checkpoint_parts is not None:
            set_checkpointing(training, True)
            training.checkpoint_parts = [*recipe.checkpoint_parts]
        model = adapt(model, family, training, lora or LoraArguments(lora_r=recipe.lora_r)).train()
        if recipe.checkpointing:
            base: PreTrainedModel = model.get_base_model() if recipe.adapters else model
            base.gradient_checkpointing_enable({"use_reentrant": False})
        batch = micro_batch(config, shape)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        _step(model, batch, optimizer, recipe.accumulation)
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _step(model, batch, optimizer, recipe.accumulation)
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [event["args"] for event in events if event["name"] == "[memory]"]
    # The total goes on from an earlier profile of the process.
    before = found[0]["Total Allocated"] - found[0]["Bytes"]
    moving = max(each["Total Allocated"] for each in found) - before
    states = [
        state for entry in optimizer.state.values() for state in entry.values() if isinstance(state, torch.Tensor)
    ]
    resting = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *states))
    return resting + moving, moving


def _step(model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, times: int) -> None:
    for _ in range(times):
        model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def micro_batch(config: dict[str, Any], shape: SampleShape) -> dict[str, torch.Tensor]:
    """Random rows of a shape: images first, then text, the labelled share at the end; the second row is shorter."""
    ids = torch.randint(3, vocab_size(config), (shape.batch, shape.tokens))
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    count = max(round(shape.tokens * shape.labelled), 1)
    labels[:, -count:] = ids[:, -count:]
    mask[1:, : shape.tokens // 8] = 0  # padded on the left, so that the labels stay
    side = max(round(shape.patches**0.5) // 4 * 4, 4)
    total = shape.batch * shape.items
    sizes = torch.tensor([[side, max(round(shape.patches / side) // 4 * 4, 4)]] * total).reshape(-1, 2)
    positions = torch.arange(shape.tokens).repeat(shape.batch, 1)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
    if not total:
        return batch
    return batch | (_seen_whole(config, shape, ids, sizes) if "text_config" in config else _seen(config, shape, sizes))


def _seen(config: dict[str, Any], shape: SampleShape, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Image inputs of the models of this package."""
    queries, first = config.get("query_num", 64), shape.tokens // 8 + 1
    bounds = [
        [row, first + item * queries, first + (item + 1) * queries]
        for row in range(shape.batch)
        for item in range(shape.items)
    ]
    patches = torch.randint(0, 255, (int(sizes.prod(1).sum()), 588), dtype=torch.uint8)
    return {"patches": patches, "tgt_sizes": sizes, "image_bound": torch.tensor(bounds)}


def _seen_whole(
    config: dict[str, Any], shape: SampleShape, ids: torch.Tensor, sizes: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Image inputs of transformers' own classes; their placeholders are written into ``ids``."""
    count, first = int(sizes.prod(1).sum()), shape.tokens // 8 + 1
    places = count // (4 if config["downsample_mode"] == "4x" else 16) // shape.batch
    ids[:] = ids.where(ids != config["image_token_id"], 3)
    ids[:, first : first + places] = config["image_token_id"]
    side = config["vision_config"]["patch_size"]
    return {"pixel_values": torch.randn(1, 3, side, count * side), "target_sizes": sizes}
