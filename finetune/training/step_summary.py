"""Global batch size and tokens per optimizer step, estimated before training from text and media headers."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.arguments.training import TrainingArguments, row_capacity
from finetune.encoding.length_policy import LengthPolicy
from finetune.sample import DataError, Sample

# Samples; enough for a stable mean, and reading their image headers takes milliseconds.
_MEASURED = 32


def describe_steps(training: TrainingArguments, samples: Sequence[Sample], length_policy: LengthPolicy) -> str:
    """Global batch, mean length and tokens per optimizer step, as one line; records with errors are skipped."""
    accumulation = training.gradient_accumulation_steps
    batch = training.per_device_train_batch_size * training.world_size * accumulation
    stride = max(len(samples) // _MEASURED, 1)
    lengths = []
    for index in range(0, len(samples), stride):
        try:
            lengths.append(len(length_policy.fit(samples[index]).rendered.input_ids))
        except DataError:
            continue
    mean = sum(lengths) / max(len(lengths), 1)
    measured = f"measured on {len(lengths)} of {len(samples)} samples"
    if training.packing == "best_fit":
        capacity = row_capacity(training)
        tokens = capacity * training.world_size * accumulation
        processes = f"{training.world_size} processes x {accumulation} accumulation"
        return (
            f"rows of at most {capacity} tokens x {processes} = at most {tokens} tokens per optimizer step; about "
            f"{mean:.0f} tokens per sample, {tokens / max(mean, 1):.0f} samples per optimizer step ({measured})"
        )
    return (
        f"global batch {batch} = {training.per_device_train_batch_size} per device x {training.world_size} processes "
        f"x {accumulation} accumulation; about {mean:.0f} tokens per sample, {mean * batch:.0f} per optimizer step "
        f"({measured})"
    )
