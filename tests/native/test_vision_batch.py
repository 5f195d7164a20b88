"""Images in pieces and parts run again, in the networks of transformers."""

from __future__ import annotations

import pytest
import torch
from test_network import MIXED, batch_of, gradients, ours


@pytest.mark.parametrize("family", ["v4_6", "v4_7"])
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("mode", ["16x", "4x"])
def test_pieces_change_nothing(native, family: str, mode: str, most: int) -> None:
    folder = native(family, mode)
    batch, model = batch_of(folder, *MIXED), ours(folder).train()
    plain = gradients(model, batch)
    loss = model(**batch).loss
    model.vision_batch = most
    calls: list[int] = []
    model.model.merger.register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model, batch)
    assert len(calls) == -(-len(batch["target_sizes"]) // most)
    torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in found.items():
        assert (gradient - plain[name]).abs().max() <= 1e-4 * plain[name].abs().max() + 1e-6, name


def test_only_the_parts_asked_for_are_run_again(native, family: str) -> None:
    model = ours(native(family))
    model.checkpoint_parts = ["llm"]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    on = {name.split(".")[1] for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", 0)}
    assert "language_model" in on
    assert not any(getattr(layer, "gradient_checkpointing", 0) for layer in model.model.vision_tower.encoder.layers)
