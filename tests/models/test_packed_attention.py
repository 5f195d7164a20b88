"""Packed rows: the result of every segment is the same as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sound_batch import sound_batch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from visual_batch import FAMILIES, Row, gradients, make_batch, pack_rows, small_model

from finetune.models import MiniCPMO, MiniCPMV, MiniCPMVConfig
from finetune.models.kv_cache import CACHE, NAMES
from finetune.models.packed_attention import LENGTHS, SEGMENTED

# Text in front, items, text behind; the clips of models with audio. One segment without labels.
SEGMENTS: list[tuple[Row, list[int]]] = [
    ((7, [(4, 6)], 5), [12]),
    ((6, [], 9), []),
    ((4, [(2, 3)], 1), []),
    ((9, [(3, 3), (5, 2)], 6), [10, 14]),
]
POISONED = 1, 3


def rows_of(model: MiniCPMV, *, poison: bool = False) -> list[dict[str, torch.Tensor]]:
    """The segments as batches of one row; with ``poison`` two of them have other tokens, images and audio."""
    rows = []
    for index, (row, clips) in enumerate(SEGMENTS):
        if isinstance(model, MiniCPMO) and clips:
            batch = sound_batch(model, [(row, clips)])
        else:
            batch = make_batch([row], model.query_num)
        if poison and index in POISONED:
            batch["input_ids"] = 159 - batch["input_ids"]
            batch["patches"] = 255 - batch["patches"]
            if "audio_features" in batch:
                batch["audio_features"] = batch["audio_features"].flip(-1) * 3
        rows.append(batch)
    return rows


@pytest.fixture(scope="module", params=FAMILIES)
def shared(request: pytest.FixtureRequest) -> MiniCPMV:
    """A small model that no test changes."""
    return small_model(request.param)


def row_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).row_loss


def assert_sealed(model: Any, expected: torch.Tensor) -> None:
    """Segments have the losses that they have alone, whatever stands beside them."""
    found = row_loss(model, pack_rows(rows_of(model)))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    poisoned = row_loss(model, pack_rows(rows_of(model, poison=True)))
    clean = [index for index in range(len(SEGMENTS)) if index not in POISONED]
    assert torch.allclose(found[clean], poisoned[clean], rtol=1e-6, atol=1e-6)
    assert (found[list(POISONED), 0] - poisoned[list(POISONED), 0]).abs().min() > 1e-2


def test_segments_have_the_losses_and_gradients_of_rows(shared: MiniCPMV) -> None:
    rows = rows_of(shared)
    tokens = int(sum((row["labels"] != -100).sum() for row in rows))
    outputs = [shared(**row, num_items_in_batch=tokens) for row in rows]
    torch.stack([output.loss for output in outputs]).sum().backward()
    expected = gradients(shared)
    shared.zero_grad()
    packed = shared(**pack_rows(rows))
    packed.loss.backward()
    found = gradients(shared)
    shared.zero_grad()
    assert torch.allclose(packed.row_loss, torch.cat([output.row_loss for output in outputs]), rtol=1e-5, atol=1e-5)
    assert packed.row_loss[:, 1].sum() == tokens
    assert packed.loss.item() == pytest.approx(sum(output.loss.item() for output in outputs), rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-5), name


def test_nothing_leaks_between_segments(shared: MiniCPMV) -> None:
    expected = torch.cat([row_loss(shared, row) for row in rows_of(shared)])
    try:
        for implementation in ("sdpa", "eager", SEGMENTED):  # the last as it was loaded
            shared.llm.set_attn_implementation(implementation)
            assert_sealed(shared, expected)
        shared.train()
        assert_sealed(shared, expected)
        for reentrant in (True, False):
            shared.gradient_checkpointing_enable({"use_reentrant": reentrant})
            found = shared(**pack_rows(rows_of(shared)))
            found.loss.backward()
            assert torch.allclose(found.row_loss.detach(), expected, rtol=1e-5, atol=1e-5)
    finally:
        shared.zero_grad()
        shared.gradient_checkpointing_disable()
        shared.eval()


def test_no_mask_is_built(shared: MiniCPMV, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack_rows(rows_of(shared))
    length, seen = batch["input_ids"].shape[1], []
    attend = F.scaled_dot_product_attention

    def watched(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("is_causal"):
            seen.append(query.shape[2])
        mask = kwargs.get("attn_mask")
        assert mask is None or length not in mask.shape
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    row_loss(shared, batch)
    ends = batch["cu_seq_lens_q"]
    assert seen == (ends[1:] - ends[:-1]).tolist() * shared.config.num_hidden_layers


def test_other_kernels_get_the_bounds_as_they_are() -> None:
    """What FlashAttention asks for: four arguments, and no mask."""
    model, seen = small_model("v4_5"), []

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append((args[4], *(kwargs[name] for name in names)))
        return sdpa_attention_forward(*args, **kwargs)

    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    AttentionInterface.register("noting", noting)  # without a mask function, none is made
    model.llm.set_attn_implementation("noting")
    batch = pack_rows(rows_of(model))
    row_loss(model, batch)
    assert len(seen) == model.config.num_hidden_layers
    assert all(found[0] is None for found in seen)
    assert all(a is b for found in seen for a, b in zip(found[1:], [batch[name] for name in names], strict=True))


def test_without_labels_there_are_logits_and_no_cache(shared: MiniCPMV) -> None:
    rows = rows_of(shared)
    without = [{name: value for name, value in row.items() if name != "labels"} for row in (pack_rows(rows), *rows)]
    with torch.no_grad():
        packed, *singles = (shared(**batch) for batch in without)
    assert packed.get(CACHE) is None
    assert torch.allclose(packed.logits[0], torch.cat([single.logits[0] for single in singles]), atol=2e-5)


@pytest.mark.parametrize("family", ["v2_0", "v4_5"])
def test_adapters_train_on_segments(family: str) -> None:
    model = small_model(family)
    rows = rows_of(model)
    torch.manual_seed(0)  # of the adapters
    settings = LoraConfig(target_modules=r"llm\..*(q|v)_proj", modules_to_save=["resampler"], init_lora_weights=False)
    adapted = get_peft_model(model, settings).train()
    expected = torch.cat([row_loss(adapted, row) for row in rows])
    assert_sealed(adapted, expected)
    adapted(**pack_rows(rows)).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert gradients(adapted).keys() == trained


def test_a_first_label_counts_for_nothing() -> None:
    model = small_model("llama3_v2_5")
    batch = pack_rows(rows_of(model))
    expected = model(**batch).row_loss
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, batch["cu_seq_lens_q"][:-1].long()] = 7
    assert torch.equal(model(**batch).row_loss, expected)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"attention_mask": torch.ones(1, 5)}, "with an attention_mask"),
        ({"use_cache": True}, "with use_cache=True"),
        *(({name: DynamicCache()}, f"with {CACHE}") for name in NAMES),
        ({"position_ids": None}, "with no position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "from 0 to 4, but the row has"),
    ],
)
def test_what_would_let_segments_see_each_other_is_refused(more: dict[str, Any], named: str) -> None:
    model = small_model("llama3_v2_5")
    with pytest.raises(ValueError, match=rf"cu_seq_lens_q.*{named}"):
        model(**pack_rows(rows_of(model)) | more)


def test_two_packed_rows_are_refused() -> None:
    model = small_model("llama3_v2_5")
    batch = pack_rows([make_batch([(5, [], 4)], model.query_num)])
    batch |= {name: batch[name].repeat(2, 1) for name in ("input_ids", "labels", "position_ids")}
    with pytest.raises(ValueError, match="with 2 rows"):
        model(**batch)


def test_sliding_windows_are_kept() -> None:
    """A model with windows falls back to a mask."""
    config = small_model("v2_6").config.to_dict()
    torch.manual_seed(0)
    windows = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
    model = MiniCPMV(MiniCPMVConfig(**config | windows)).eval()
    assert model.llm.config.layer_types == ["full_attention", "sliding_attention"]
    rows = rows_of(model)
    expected = torch.cat([row_loss(model, row) for row in rows])
    assert torch.allclose(row_loss(model, pack_rows(rows)), expected, rtol=1e-5, atol=1e-5)


def test_the_name_of_the_attention_is_not_saved(tmp_path: Any) -> None:
    model = small_model("llama3_v2_5")
    assert model.llm.config._attn_implementation == SEGMENTED
    model.save_pretrained(tmp_path)
    assert SEGMENTED not in (tmp_path / "config.json").read_text()
    assert LENGTHS not in (tmp_path / "config.json").read_text()
