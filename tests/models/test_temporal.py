"""Packed video frames: several items with one run of placeholders."""

from __future__ import annotations

import pytest
import torch
from visual_batch import make_batch, pixels, prompt, small_model

from finetune.models import MiniCPMV
from finetune.models.positions import sincos_times

# Per row: groups of (time, size of the frame).
Groups = list[list[tuple[int, tuple[int, int]]]]
ROWS: list[Groups] = [
    [[(-1, (4, 6))], [(0, (3, 4)), (3, (3, 4)), (6, (3, 4))]],
    [[(9, (2, 5)), (12, (5, 2))], [(-1, (2, 2))], [(15, (3, 3))]],
]


@pytest.fixture
def model() -> MiniCPMV:
    return small_model("v4_5")


def packed(model: MiniCPMV, rows: list[Groups], side: str = "right") -> dict[str, torch.Tensor]:
    """The batch of one placeholder run per group; frames are the same wherever their row stands."""
    batch = make_batch([(3, [(1, 1)] * len(groups), 4 + len(groups)) for groups in rows], model.query_num, side=side)
    flat = [frame for groups in rows for group in groups for frame in group]
    return batch | {
        "patches": torch.cat([pixels(size, time + 40 + sum(size)) for time, size in flat]),
        "tgt_sizes": torch.tensor([size for _, size in flat]),
        "temporal_ids": torch.tensor([time for time, _ in flat]),
        "group_sizes": torch.tensor([len(group) for groups in rows for group in groups]),
    }


def features(model: MiniCPMV, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        names = ("patches", "tgt_sizes", "temporal_ids", "group_sizes")
        return model.get_image_features(*(batch[name] for name in names))


def logits(model: MiniCPMV, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def test_two_samples_equal_single_samples(model: MiniCPMV) -> None:
    batch = packed(model, ROWS)
    together = logits(model, batch)
    assert features(model, batch).shape == (5, model.query_num, 256)
    for index, row in enumerate(ROWS):
        single = logits(model, packed(model, [row]))
        assert torch.allclose(together[index, : single.shape[1]], single[0], atol=2e-5)


def test_a_group_is_one_attention_over_its_frames_and_only_those(model: MiniCPMV) -> None:
    batch = packed(model, ROWS)
    before = features(model, batch)
    batch["patches"] = batch["patches"].clone()
    batch["patches"][24 + 13] += 50  # the second patch of the second frame of the second group
    after = features(model, batch)
    moved = (before - after).abs().amax(dim=(1, 2))
    assert moved[1] > 1e-4
    assert (moved[[0, 2, 3, 4]] == 0).all()


def test_time_counts_and_stills_have_none(model: MiniCPMV) -> None:
    batch = packed(model, ROWS)
    before = features(model, batch)
    later = features(model, batch | {"temporal_ids": batch["temporal_ids"] + 5 * (batch["temporal_ids"] == 6)})
    assert (before - later).abs().amax(dim=(1, 2)).gt(1e-4).tolist() == [False, True, False, False, False]
    stills = make_batch([(3, [(4, 6), (3, 3)], 5)], model.query_num)
    plain = model.get_image_features(stills["patches"], stills["tgt_sizes"])
    assert torch.equal(plain, model.get_image_features(stills["patches"], stills["tgt_sizes"], stills["temporal_ids"]))
    assert (sincos_times([-1, 0], 8)[0] == 0).all()
    assert sincos_times([-1, 0], 8)[1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_late_times_have_the_published_values() -> None:
    ours = sincos_times([71_999], 256)[0].double()
    omega = (1.0 / 10000 ** (torch.arange(128, dtype=torch.float32) / 128)).double()
    exact = torch.cat([(71_999 * omega).sin(), (71_999 * omega).cos()])
    assert torch.allclose(ours, exact, atol=5e-3)  # the product is rounded to float32, there as here


def test_gradients_are_those_of_single_samples(model: MiniCPMV) -> None:
    model(**packed(model, ROWS), num_items_in_batch=1).loss.backward()
    together = model.resampler.kv_proj.weight.grad
    assert together is not None
    model.resampler.kv_proj.weight.grad = None
    for row in ROWS:
        model(**packed(model, [row]), num_items_in_batch=1).loss.backward()
    alone = model.resampler.kv_proj.weight.grad
    assert alone is not None
    assert torch.allclose(together, alone, atol=1e-5)


def test_beams_repeat_groups(model: MiniCPMV) -> None:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    together = packed(model, ROWS, side="left")
    length = together["input_ids"].shape[1]
    tokens = model.generate(**prompt(together), **options)[:, length:].tolist()
    for row, expected in zip(ROWS, tokens, strict=True):
        single = packed(model, [row])
        assert model.generate(**prompt(single), **options)[0, single["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_sizes": torch.tensor([1, 3, 2, 1])}, r"\[1, 3, 2, 1\] must be positive and add up to the 8"),
        ({"group_sizes": torch.tensor([1, 3, 2, 2, 0])}, "must be positive"),
        ({"group_sizes": None}, "8 visual items, but image_bound has 5 rows"),
        ({"temporal_ids": torch.tensor([-1, 0, 3, 6, 9, -2, -1, 15])}, "temporal_ids has -2"),
    ],
)
def test_disagreeing_inputs(model: MiniCPMV, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**packed(model, ROWS) | change)
