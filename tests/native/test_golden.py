"""The recorded figures of 4.6, 4.7 and OCR, by our encoder and our networks."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conversations import CONVERSATIONS, encoder, sample
from golden import CASES, FAMILIES, GOLDEN, fill, moments
from transformers import AutoConfig

from finetune.encoding.collate import pad
from finetune.models.minicpmv4_6 import NATIVE_MODELS


@pytest.fixture(scope="module", params=FAMILIES)
def recorded(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, json.loads((GOLDEN / request.param / "golden.json").read_text())["cases"]


@pytest.fixture(scope="module")
def network(recorded: tuple[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(GOLDEN / recorded[0])
    model = NATIVE_MODELS[config.model_type](config)
    fill(model)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_golden(recorded: tuple[str, dict[str, Any]], network: Any, name: str) -> None:
    family, cases = recorded
    wanted, made = cases[name], encoder(GOLDEN / family)
    prompt = made.encode(sample(CONVERSATIONS[name]), generate=True)
    example = made.encode(sample(CONVERSATIONS[name]))
    assert prompt.input_ids.tolist() == wanted["prompt"]
    assert example.input_ids.tolist() == wanted["ids"]
    assert example.labels.tolist() == wanted["labels"]
    assert example.tgt_sizes.tolist() == wanted.get("target_sizes", [])
    batch = pad([example], made.pad_id)
    if "pixels" in wanted:
        assert moments(batch["pixel_values"]) == pytest.approx(wanted["pixels"], rel=1e-4)
    network.zero_grad()
    loss = network(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-5)
    for part, norm in wanted["gradients"].items():
        found = [weight.grad for key, weight in network.named_parameters() if key.startswith(part)]
        squares = sum(gradient.double().square().sum() for gradient in found if gradient is not None)
        assert torch.as_tensor(squares).sqrt().item() == pytest.approx(norm, rel=1e-4, abs=1e-9)
