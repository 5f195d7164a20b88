"""--unit_loss_weights: which labels have a weight, and what it does to loss and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sounds import write_wav
from torch.nn import functional as F

from finetune.arguments.parse import parse_arguments
from finetune.arguments.unit_weights import parse_unit_weights
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.commands.check import main as check
from finetune.encoding.collate import pack, pad
from finetune.encoding.encoder import Encoder
from finetune.encoding.example import Example
from finetune.models import load_model
from finetune.readers import read
from finetune.tokenizers.tokenization import load_tokenizer
from finetune.utils.errors import ArgumentError

WEIGHTS = {"listen": 0.5, "speak": 2.0, "yield": 5.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two timelines and two conversations."""
    folder = tmp_path_factory.mktemp("data")
    write_wav(folder / "a.wav", 4)
    user = [{"audio": "a.wav", "start": 0}]
    words = [["Yes,", 0.0], ["yes.", 1.0]]
    turns = [[{"text": "Yes, yes.", "start": 0.5, "words": words}], [{"text": "No.", "start": 2.5}]]
    records: list[Any] = [{"id": str(i), "duplex": {"user": user, "assistant": turn}} for i, turn in enumerate(turns)]
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    records += [{"id": str(number), "conversations": talk} for number in (2, 3)]
    (folder / "mixed.json").write_text(json.dumps(records))
    (folder / "talk.json").write_text(json.dumps(records[2:]))
    return folder


@pytest.fixture(scope="module")
def make(tiny: Callable[[str], Path], data: Path) -> Callable[..., list[Example]]:
    base = resolve_base(str(tiny("o4_5")))
    tokenizer, samples = load_tokenizer(base.folder), read(data / "mixed.json")

    def made(weights: dict[str, float] | None) -> list[Example]:
        encoder = Encoder(base.family, tokenizer, base.settings, unit_weights=weights)
        return [encoder.encode(sample) for sample in samples]

    return made


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Any:
    return load_model(tiny("o4_5"))


def gradients(model: Any, *batches: dict[str, Any], items: int | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_a_decision_has_the_weight_of_its_kind(make: Callable[..., list[Example]], tiny: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(tiny("o4_5"))
    names = {"<|listen|>": [], "<|speak|>": []}
    first, _, talk, _ = make(WEIGHTS)
    assert first.loss_weights is not None
    for token, label, weight in zip(first.input_ids, first.labels, first.loss_weights, strict=True):
        name = tokenizer.decode(token)
        if name in names:
            assert label >= 0
            names[name].append(weight.item())
        else:
            assert weight == 1
    assert names == {"<|speak|>": [2.0, 2.0], "<|listen|>": [5.0, 0.5]}
    assert talk.loss_weights is None


def test_a_name_left_out_weighs_one(make: Callable[..., list[Example]]) -> None:
    assert parse_unit_weights("yield=5") == {"yield": 5.0}
    first = make({"yield": 5.0})[0]
    assert first.loss_weights is not None
    assert sorted(set(first.loss_weights.tolist())) == [1.0, 5.0]


def test_without_weights_nothing_changes(make: Callable[..., list[Example]], model: Any) -> None:
    plain, ones = make(None), make(dict.fromkeys(WEIGHTS, 1.0))
    assert "loss_weights" not in pad(plain, 0)
    assert "loss_weights" not in pack(plain)
    assert "loss_weights" not in pad(make(WEIGHTS)[2:], 0)
    loss, grads = gradients(model, pad(plain, 0))
    weighted, same = gradients(model, pad(ones, 0))
    assert weighted == loss
    assert all(torch.equal(same[name], grad) for name, grad in grads.items())


def test_the_loss_is_the_weighted_sum_over_the_number_of_labels(make: Callable[..., list[Example]], model: Any) -> None:
    batch = pad(make(WEIGHTS), 0)
    labels, weights = batch["labels"][:, 1:], batch["loss_weights"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
        out = model(**batch)
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    expected = (nll * weights.flatten()).sum() / (labels >= 0).sum()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # What is evaluated and watched stays the plain loss.
    assert out.row_loss[:, 0].sum().item() == pytest.approx(nll.sum().item(), rel=1e-5)
    model.train()


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "frozen head"])
def test_packed_and_accumulated_are_padded(make: Callable[..., list[Example]], model: Any, adapted: bool) -> None:
    model.llm.lm_head.weight.requires_grad_(not adapted)
    examples = make(WEIGHTS)
    items = sum(int((example.labels >= 0).sum()) for example in examples)
    loss, grads = gradients(model, pad(examples, 0), items=items)
    for batches in ([pack(examples)], [pad([example], 0) for example in examples]):
        other, same = gradients(model, *batches, items=items)
        assert other == pytest.approx(loss, rel=1e-5)
        assert same.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(same[name], grad, rtol=1e-3, atol=1e-5)
    model.llm.lm_head.weight.requires_grad_(True)


def test_a_head_that_is_no_plain_layer_weighs_alike(make: Callable[..., list[Example]], model: Any) -> None:
    """Such as one with trained rows, or in 4 bit."""
    batch = pad(make(WEIGHTS), 0)
    loss, grads = gradients(model, batch)
    head = model.llm.lm_head
    model.llm.lm_head = torch.nn.Sequential(head)
    other, same = gradients(model, batch)
    model.llm.lm_head = head
    assert other == pytest.approx(loss, rel=1e-5)
    name = "llm.model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(same[name], grads[name], rtol=1e-3, atol=1e-5)


def test_an_example_keeps_its_weights_when_it_is_replaced(make: Callable[..., list[Example]]) -> None:
    first = make(WEIGHTS)[0]
    assert replace(first, source="other").loss_weights is first.loss_weights


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("listen", "it is such as listen=1,speak=1,yield=5"),
        ("hear=1", "each of listen, speak, yield at most once"),
        ("speak=1,speak=2", "at most once"),
        ("speak=x", "the weight of speak is 'x'"),
        ("speak=-1", "a number from 0 to 1000"),
        ("speak=nan", "a number from 0 to 1000"),
    ],
)
def test_mistakes_are_said(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        parse_unit_weights(text)


def test_data_without_timelines_and_pairs_are_refused(
    tiny: Callable[[str], Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny("o4_5")), "--unit_loss_weights", "yield=5"]
    assert check([*flags, "--data", str(data / "mixed.json")]) == 0
    capsys.readouterr()
    assert check([*flags, "--data", str(data / "talk.json")]) != 0
    assert "none of its records is a full-duplex one, and --unit_loss_weights" in capsys.readouterr().err
    base = ["--model_name_or_path", str(tiny("o4_5")), "--data_path", str(data / "talk.json"), "--output_dir", "out"]
    with pytest.raises(ArgumentError, match="which --stage dpo has none of"):
        parse_arguments([*base, "--unit_loss_weights", "yield=5", "--stage", "dpo"])
