"""Forward pass: batches, loss and the dummy image."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from visual_batch import Row, gradients, make_batch, small_model

from finetune.models import MiniCPMV
from finetune.models.packed_attention import SEGMENTED
from finetune.models.varlen_attention import split_attention
from finetune.models.vision import PatchProjection, normalize

ROWS: list[Row] = [(3, [(4, 6)], 5), (6, [], 4), (2, [(3, 3), (5, 2), (5, 2)], 6)]


def full_logits(model: MiniCPMV, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def reference_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none")


def test_mixed_batch_equals_single_rows(model: MiniCPMV) -> None:
    queries = model.query_num
    logits = full_logits(model, make_batch(ROWS, queries))
    for index, row in enumerate(ROWS):
        single = full_logits(model, make_batch([row], queries))
        assert torch.allclose(logits[index, : single.shape[1]], single[0], atol=2e-5)


def test_text_row_does_not_see_the_images_of_others(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num)
    before = full_logits(model, batch)
    batch["patches"] = 255 - batch["patches"]
    after = full_logits(model, batch)
    assert torch.equal(before[1], after[1])
    assert (before[0] - after[0]).abs().max() > 0.1
    assert (before[2] - after[2]).abs().max() > 0.1


def test_every_patch_and_every_item_counts(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num)
    with torch.no_grad():
        before = model.get_image_features(batch["patches"], batch["tgt_sizes"])
        changed = batch["patches"].clone()
        changed[24 + 9] += 50  # first patch of the third item
        after = model.get_image_features(changed, batch["tgt_sizes"])
    moved = [(before[i] - after[i]).abs().max().item() for i in range(4)]
    assert moved[2] > 1e-4
    assert moved[0] == moved[1] == moved[3] == 0


def test_loss_is_the_mean_over_labels_and_respects_the_given_count(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num)
    nll = reference_loss(full_logits(model, batch), batch["labels"]).reshape(3, -1)
    counts = (batch["labels"] != -100).sum(dim=1)
    output = model(**batch)
    assert output.logits is None
    assert torch.allclose(output.loss, nll.sum() / counts.sum(), atol=1e-5)
    assert torch.allclose(output.row_loss, torch.stack([nll.sum(dim=1), counts.float()], dim=1), atol=1e-4)
    for count in (7, torch.tensor(7)):
        assert torch.allclose(model(**batch, num_items_in_batch=count).loss, nll.sum() / 7, atol=1e-5)


def test_a_batch_without_labels_gives_zero_not_nan(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(**batch)
    output.loss.backward()
    assert output.loss.item() == 0
    assert output.row_loss.tolist() == [[0, 0]] * 3
    grads = gradients(model)
    assert all((grad == 0).all() for grad in grads.values())
    assert "llm.lm_head.weight" in grads


def test_logits_to_keep(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num)
    del batch["labels"]
    with torch.no_grad():
        assert torch.allclose(model(**batch, logits_to_keep=2).logits, model(**batch).logits[:, -2:], atol=1e-5)


def test_text_batch_reaches_every_parameter_with_zero(model: MiniCPMV) -> None:
    model.train()
    text = make_batch([(5, [], 5), (4, [], 3)], model.query_num)
    model(**text).loss.backward()
    grads = gradients(model)
    assert set(grads) == {name for name, p in model.named_parameters() if p.requires_grad}
    media = [grad for name, grad in grads.items() if not name.startswith("llm.")]
    assert media
    assert all((grad == 0).all() for grad in media)
    assert grads["llm.lm_head.weight"].abs().sum() > 0


@pytest.mark.parametrize(("training", "labelled", "calls"), [(True, False, 1), (False, True, 1), (False, False, 0)])
def test_when_the_dummy_runs(model: MiniCPMV, training: bool, labelled: bool, calls: int) -> None:
    model.train(training)
    seen = []
    model.vpm.register_forward_hook(lambda *_: seen.append(1))
    batch = make_batch([(5, [], 5)], model.query_num)
    if not labelled:
        del batch["labels"]
    model(**batch)
    assert len(seen) == calls


def test_the_dummy_changes_nothing(model: MiniCPMV) -> None:
    batch = make_batch([(5, [], 5)], model.query_num)
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        assert torch.equal(model.train()(**plain).logits, model.eval()(**plain).logits)


def test_one_call_per_tower_whatever_the_sizes(model: MiniCPMV) -> None:
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if not name.startswith("llm"):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(**make_batch(ROWS, model.query_num))
    calls.pop("", None)
    assert len(calls) > 20
    assert set(calls.values()) == {1}


def test_frozen_tower_has_no_graph_even_with_input_hooks(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num)
    seen = []
    model.vpm.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    model.vpm.requires_grad_(False)
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    parameter = next(model.vpm.parameters()).requires_grad_(True)
    model(**batch).loss.backward()
    assert seen == [False, True]
    assert parameter.grad is not None


def test_eager_equals_sdpa(model: MiniCPMV) -> None:
    batch = make_batch(ROWS, model.query_num)
    eager = small_model(model.config.family.name, attn_implementation="eager")
    assert eager.llm.config._attn_implementation == eager.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    assert model.llm.config._attn_implementation == SEGMENTED
    assert torch.allclose(full_logits(model, batch), full_logits(eager, batch), atol=1e-4)
    model.set_attn_implementation("eager")
    assert model.llm.config._attn_implementation == model.vpm.config._attn_implementation == "eager"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_split_attention_is_attention_per_item(implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q_lengths, k_lengths = [2, 2, 3, 1], [4, 4, 5, 4]
    q = torch.randn(sum(q_lengths), 3, 8, generator=generator)
    k, v = (torch.randn(sum(k_lengths), 3, 8, generator=generator) for _ in range(2))
    out = split_attention(q, k, v, q_lengths, k_lengths, implementation)
    parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    for ours, (qi, ki, vi) in zip(out.split(q_lengths), parts, strict=True):
        weights = (torch.einsum("qhd,khd->hqk", qi, ki) / 8**0.5).softmax(-1)
        assert torch.allclose(ours, torch.einsum("hqk,khd->qhd", weights, vi), atol=1e-6)


def test_flash_attention_without_the_package_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="FlashAttention2"):
        small_model("llama3_v2_5", attn_implementation="flash_attention_2")


def test_sixteen_bit_weights_with_and_without_float32_parts(model: MiniCPMV) -> None:
    """Frozen parts bf16, trained parts float32, under autocast (training) and without (loading an adapter)."""
    batch = make_batch(ROWS, model.query_num)
    exact = model(**batch).loss.item()
    model.bfloat16()
    assert model(**batch).loss.item() == pytest.approx(exact, abs=0.1)
    model.llm.requires_grad_(False)
    model.resampler.float()
    assert model(**batch).loss.item() == pytest.approx(exact, abs=0.1)
    towers = [part for name, part in model.named_children() if name != "llm"]
    for tower in towers:
        tower.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, abs=0.1)
    grads = gradients(model)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert len({name.split(".")[0] for name in grads}) == len(towers)


def wrong(batch: dict[str, torch.Tensor], queries: int) -> dict[str, tuple[dict, str]]:
    size = batch["tgt_sizes"].clone()
    size[0, 0] += 1
    short = batch["image_bound"].clone()
    short[1, 2] -= 1
    outside = batch["image_bound"] + torch.tensor([0, 50, 50])
    ids = batch["temporal_ids"].clone()
    ids[2] = 3
    total = len(batch["patches"])
    return {
        "patches": ({"tgt_sizes": size}, f"{total + 6} patches, but {total} were given"),
        "items": ({"image_bound": batch["image_bound"][:-1]}, "4 visual items, but image_bound has 3 rows"),
        "queries": ({"image_bound": short}, f"needs {queries} placeholders, but its image_bound has {queries - 1}"),
        "outside": ({"image_bound": outside}, "batch has 3 rows"),
        "temporal": ({"temporal_ids": ids}, "temporal_ids has 3"),
        "temporal count": ({"temporal_ids": ids[:2]}, "4 visual items, but 2 temporal_ids"),
        "groups": ({"group_sizes": torch.tensor([1, 2, 1])}, "group_sizes has 2, but this model has no temporal"),
        "group count": ({"group_sizes": torch.tensor([1, 1])}, r"\[1, 1\] must be positive and add up to the 4"),
        "sound": ({"audio_features": torch.zeros(1, 80, 60)}, "has no audio tower"),
        "floats": ({"patches": batch["patches"].float()}, "must be uint8"),
        "width": ({"patches": batch["patches"][:, :-1]}, r"must be \(N, 588\)"),
        "no sizes": ({"tgt_sizes": None}, "patches and image_bound given without tgt_sizes"),
        "features only": ({"image_features": torch.zeros(4, queries, 256), "image_bound": None}, "without image_bound"),
    }


@pytest.mark.parametrize("fault", list(wrong(make_batch(ROWS, 8), 8)))
def test_disagreeing_inputs_name_both_numbers(fault: str) -> None:
    model = small_model("llama3_v2_5")
    batch = make_batch(ROWS, model.query_num)
    change, message = wrong(batch, model.query_num)[fault]
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


def test_batch_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        small_model("llama3_v2_5")()


def test_every_byte_is_normalised_to_the_bit_of_the_published_formula() -> None:
    patches = torch.arange(256, dtype=torch.uint8).repeat(3)[None]
    published = ((patches.float() / 255 - 0.5) / 0.5).unflatten(1, (3, 16, 16))
    assert torch.equal(normalize(patches, 16, torch.float32), published)


def test_the_patch_projection_is_the_convolution() -> None:
    conv = torch.nn.Conv2d(3, 8, 14, 14)
    ours = PatchProjection(3, 8, 14, 14)
    ours.load_state_dict(conv.state_dict())
    pixels = normalize(torch.randint(0, 256, (5, 3 * 14 * 14), dtype=torch.uint8), 14, torch.float32)
    one, other = conv(pixels), ours(pixels)
    torch.testing.assert_close(other, one)
    for made in (one, other):
        made.square().sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, conv.get_parameter(name).grad)
