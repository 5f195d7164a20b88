"""The chunked loss in the output layer equals plain cross entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from visual_batch import Row, gradients, make_batch, small_model

from finetune.models import lm_head_loss as heads
from finetune.models.lm_head_loss import LMHeadLoss, linear_nll, rows_at_once, supervised_loss, token_nll

ROWS: list[Row] = [(3, [(4, 6)], 5), (6, [], 4), (2, [(3, 3)], 6)]
M, V, E = 11, 37, 8


def made(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, E, generator=generator).to(dtype) for n in (M, V))
    return hidden, weight, torch.randint(V, (M,), generator=generator)


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scaling: float) -> torch.Tensor:
    return F.cross_entropy(hidden.float() @ weight.float().T / scaling, targets, reduction="sum")


@pytest.mark.parametrize("scaling", [1.0, 9.0])
@pytest.mark.parametrize("rows", [1, 4, M, 100, None])
def test_equals_plain_cross_entropy(rows: int | None, scaling: float) -> None:
    hidden, weight, targets = made()
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    theirs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, nll = linear_nll(ours[0], ours[1], targets, scaling, rows)
    expected = plain(theirs[0], theirs[1], targets, scaling)
    (total / 7).backward()
    (expected / 7).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert nll.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert not nll.requires_grad
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(grad_of(a), grad_of(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", [1.0, 9.0])
@pytest.mark.parametrize("rows", [1, 4, 100, None])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_tokens_with_different_weights_equal_plain_cross_entropy(
    trained: tuple[bool, bool], rows: int | None, scaling: float
) -> None:
    hidden, weight, targets = made()
    factors = torch.linspace(-1, 2, M)
    ours, theirs = (
        [each.clone().requires_grad_(wanted) for each, wanted in zip((hidden, weight), trained, strict=True)]
        for _ in range(2)
    )
    nll = token_nll(ours[0], ours[1], targets, scaling, rows)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T / scaling, targets, reduction="none")
    (nll * factors).sum().backward()
    (expected * factors).sum().backward()
    assert torch.allclose(nll, expected, rtol=1e-5)
    for a, b, wanted in zip(ours, theirs, trained, strict=True):
        assert (a.grad is not None) == wanted
        assert not wanted or torch.allclose(grad_of(a), grad_of(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", ["hidden", "weight", "neither", "no grad"])
def test_gradients_only_where_they_are_wanted(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = made()
    made_products = []
    monkeypatch.setattr(heads, "_add_product", lambda *_: made_products.append(1))
    hidden.requires_grad_(trained in ("hidden", "no grad"))
    weight.requires_grad_(trained in ("weight", "no grad"))
    with torch.set_grad_enabled(trained != "no grad"):
        total, _ = linear_nll(hidden, weight, targets, rows=4)
    assert total.requires_grad == (trained in ("hidden", "weight"))
    assert len(made_products) == (3 if trained == "weight" else 0)
    if total.requires_grad:
        total.backward()
        assert (hidden.grad is None) == (trained == "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, M])
def test_sixteen_bit(dtype: torch.dtype, rows: int) -> None:
    hidden, weight, targets = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in made(dtype))
    exact = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    total, _ = linear_nll(hidden, weight, targets, rows=rows)
    expected = plain(exact[0], exact[1], targets, 1.0)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-2)
    total.backward()
    expected.backward()
    for tensor, reference in zip((hidden, weight), exact, strict=True):
        assert grad_of(tensor).dtype == dtype
        assert torch.allclose(grad_of(tensor).float(), grad_of(reference), atol=0.05)


def test_autocast_computes_in_its_type_and_trains_float32() -> None:
    hidden, weight, targets = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in made())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, nll = linear_nll(hidden, weight, targets, rows=4)
        logits = F.linear(hidden, weight)
    assert torch.allclose(nll, F.cross_entropy(logits.float(), targets, reduction="none"), atol=1e-6)
    total.backward()
    assert grad_of(weight).dtype == grad_of(hidden).dtype == torch.float32


def test_never_more_logits_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = made()
    seen, softmax = [], F.log_softmax
    monkeypatch.setattr(heads, "BUDGET", 3 * 8 * V + 5)
    monkeypatch.setattr(F, "log_softmax", lambda x, **kwargs: seen.append(len(x)) or softmax(x, **kwargs))
    linear_nll(hidden.requires_grad_(), weight, targets)
    assert seen == [3, 3, 3, 2]
    monkeypatch.setattr(heads, "BUDGET", 1)
    seen.clear()
    linear_nll(hidden, weight, targets)
    assert seen == [1] * M


def test_trained_sixteen_bit_weights_are_not_summed_where_all_logits_take_less() -> None:
    weight = torch.empty(100_000, 1024, dtype=torch.bfloat16, device="meta")
    assert rows_at_once(512, weight) == rows_at_once(600, weight) == heads.BUDGET // 800_000
    assert rows_at_once(512, weight.requires_grad_()) == 512
    assert rows_at_once(600, weight) == heads.BUDGET // 800_000


def test_nothing_labelled_is_zero_with_gradients_of_zero() -> None:
    hidden = torch.randn(2, 5, E, requires_grad=True)
    head = LMHeadLoss(nn.Linear(E, V, bias=False))
    loss, rows = supervised_loss(hidden, torch.full((2, 5), -100), head, None)
    assert loss.item() == 0
    assert rows.tolist() == [[0, 0]] * 2
    loss.backward()
    assert not grad_of(hidden).any()
    assert not grad_of(head.weight).any()


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, targets = made()
    total, _ = linear_nll(hidden.requires_grad_(), weight, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def with_plain_head(model: Any) -> Any:
    plain_head = nn.Linear(1, 1, bias=False)
    plain_head.weight = model.llm.lm_head.weight
    model.set_output_embeddings(plain_head)
    return model


def test_a_network_trains_as_with_a_plain_output_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "BUDGET", 8 * 160 * 3)
    for family in ("v2_0", "v4_5"):  # Granite's scaling; none
        model = small_model(family)
        batch = make_batch(ROWS, model.query_num)
        assert type(model.llm.lm_head) is LMHeadLoss
        found = model(**batch, num_items_in_batch=30)
        found.loss.backward()
        ours = gradients(model)
        model.zero_grad()
        expected = with_plain_head(model)(**batch, num_items_in_batch=30)
        expected.loss.backward()
        assert torch.allclose(found.loss, expected.loss, rtol=1e-6)
        assert torch.allclose(found.row_loss, expected.row_loss, rtol=1e-5)
        theirs = gradients(model)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-6), name


def test_tied_weights_get_both_gradients() -> None:
    model = small_model("v4_5")
    batch = make_batch(ROWS, model.query_num)
    model.llm.lm_head.weight = model.llm.model.embed_tokens.weight
    model(**batch).loss.backward()
    ours = grad_of(model.llm.lm_head.weight).clone()
    model.zero_grad()
    with_plain_head(model)(**batch).loss.backward()
    assert torch.allclose(ours, grad_of(model.llm.model.embed_tokens.weight), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_of_the_output_layer(settings: dict[str, Any]) -> None:
    model = small_model("llama3_v2_5")
    batch = make_batch(ROWS, model.query_num)
    expected = model(**batch)
    settings = {"target_modules": r"llm\..*q_proj"} | settings
    adapted = get_peft_model(model, LoraConfig(**settings)).train()
    found = adapted(**batch)
    assert torch.allclose(found.row_loss, expected.row_loss, rtol=1e-5)
    found.loss.backward()
    assert all("lm_head" not in name or grad.any() or "lora_A" in name for name, grad in gradients(adapted).items())
    assert any("lm_head" in name for name in gradients(adapted))


def test_a_resized_output_layer_is_still_ours() -> None:
    model = small_model("llama3_v2_5")
    model.resize_token_embeddings(170, mean_resizing=False)
    assert type(model.get_output_embeddings()) is LMHeadLoss
    assert model.get_output_embeddings().weight.shape == (170, 256)


@pytest.mark.parametrize(
    "shape", [(1, 8), (1, 1, 8), (2, 8), (2, 1, 8), (8, 1, 8), (2, 4, 8), (9, 1, 8), (2, 2**13 + 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_decoding_steps_are_those_of_the_layer(shape, dtype):
    linear = nn.Linear(shape[-1], 31, bias=False).to(dtype)
    hidden = torch.randn(shape).to(dtype)
    expected = linear(hidden)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            logits = LMHeadLoss(linear)(hidden)
        assert logits.shape == (*shape[:-1], 31)
        assert logits.dtype == dtype
        assert logits.requires_grad == (context is torch.enable_grad)
        torch.testing.assert_close(logits, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert LMHeadLoss(linear)(hidden).dtype == torch.bfloat16
