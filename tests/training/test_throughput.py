"""The FLOPs model against the FLOPs counted by torch, and the logged throughput with a fake clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from variants import MIXTURE, VARIANTS, family_of

from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.families import by_name
from finetune.families.family import Family
from finetune.models import load_model
from finetune.models.adapters import base_model_of
from finetune.models.minicpmv4_6 import NativeModelMixin
from finetune.training.flops import COUNTS, Flops, flops_of
from finetune.training.freezing import adapt
from finetune.training.throughput import Throughput, peak_of

FULL: dict[str, Any] = {}
LORA = {"use_lora": True}
FROZEN = {"tune_vision": False, "tune_llm": False}
HEAD = {"tune_vision": False, "tune_resampler": False}


def trained(folder, name: str, tmp_path, **flags) -> Any:
    """A tiny base_model as it is trained; eager attention and experts, whose products torch counts on a CPU."""
    experts: dict[str, Any] = {"experts_implementation": "eager"} if name == MIXTURE else {}
    model = load_model(folder, dtype=torch.float32, attn_implementation="eager", **experts)
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **flags)
    return adapt(model, family_of(name), training, LoraArguments(lora_r=4)).train()


def own_batch(model: Any, *, audio: bool = False) -> dict[str, torch.Tensor]:
    """One row of 3 items and a text; no padding."""
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    queries, sizes = base_model.query_num, [[4, 6], [4, 6], [8, 4]]
    length = 3 * queries + 40 + (30 if audio else 0)
    ids = torch.randint(5, 90, (1, length))
    labels = torch.where(torch.arange(length) >= length - 25, ids, -100)
    bounds = torch.tensor([[0, 2 + item * queries, 2 + (item + 1) * queries] for item in range(3)])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length)[None],
        "labels": labels,
        "patches": torch.randint(0, 255, (80, 588), dtype=torch.uint8),
        "tgt_sizes": torch.tensor(sizes),
        "image_bound": bounds,
        "temporal_ids": torch.full((3,), -1),
    }
    if audio:
        frames = 2 * 10 * base_model.pool_step
        start = 3 * queries + 4
        sound = {"audio_features": torch.randn(1, base_model.apm.num_mel_bins, frames)}
        sound |= {"audio_lengths": torch.tensor([frames]), "audio_bound": torch.tensor([[0, start, start + 10]])}
        batch |= sound
    return batch


def whole_batch(model: Any) -> dict[str, torch.Tensor]:
    """The same for a base_model of transformers: items of 16, 32 and 16 patches, 16 or 4 of which are a token."""
    side = 2 if base_model_of(model).config.downsample_mode == "4x" else 4
    sizes = torch.tensor([[4, 4], [8, 4], [4, 4]])
    ids = torch.randint(5, 90, (1, 64))
    ids[0, 2 : 2 + 64 // side**2] = base_model_of(model).config.image_token_id
    labels = torch.where(torch.arange(64) >= 40, ids, -100)
    pixels = torch.randn(1, 3, 14, 64 * 14)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(64)[None]}
    return {**given, "labels": labels, "pixel_values": pixels, "target_sizes": sizes}


def convolution_backward(grad: Any, _: Any, weight: Any, *rest: Any, **more: Any) -> int:
    """Operations of the gradients of a convolution; torch takes one in groups for a dense one."""
    wanted = rest[-1][:2]  # of the input, of the weights
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(wanted)


# torch knows the product that is added to a new tensor, not that which is added in place
BY_HAND = {
    torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.convolution_backward: convolution_backward,
}


def watched(run: Callable[[], Any]) -> dict[str, dict[Any, int]]:
    """Operations that torch counts of a run, by module and kind; "Global" is the whole."""
    with FlopCounterMode(display=False, depth=20, custom_mapping=BY_HAND) as counter:
        run()
    return {name.rpartition("ForConditionalGeneration.")[2]: kinds for name, kinds in counter.get_flop_counts().items()}


def counted(model: Any, batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Operations of a forward pass, and of a backward pass with what the loss computes ahead for it.

    Left out is the delta rule of linear attention: transformers computes it in blocks of tokens, with more operations
    than the recurrence has that is counted here. Where torch does not see attention, its are the only batched products.
    """

    def forward() -> None:
        with torch.no_grad():
            model(**batch)

    totals = []
    runs = (forward, lambda: model(**batch).loss.backward())
    for run in runs:
        totals.append(sum(watched(run)["Global"].values()))
    base_model = base_model_of(model)
    if isinstance(base_model, NativeModelMixin):
        base_model.set_attn_implementation("sdpa")
        totals = [total - watched(run)["Global"][torch.ops.aten.bmm] for total, run in zip(totals, runs, strict=True)]
    return totals[0], totals[1] - totals[0]


def expected(model: Any, family: Family, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Ours without the delta rule, with attention over the whole square, as torch computes and counts it."""
    flops = flops_of(model, family)
    counts = {name: int(value) for name, value in flops.counts(batch).items()}
    counts["pairs"] *= 2
    counts["step_pairs"] = counts["steps"] ** 2
    forward, backward = (
        sum(costs[name] * counts[name] for name in COUNTS) for costs in (flops.forward, flops.backward)
    )
    rule = 0
    for module in base_model_of(model).modules():
        if hasattr(module, "head_v_dim"):
            rule += 6 * module.num_v_heads * module.head_k_dim * module.head_v_dim * counts["tokens"]
    return forward - rule, backward - 2 * rule


@pytest.mark.parametrize("flags", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", VARIANTS)
def test_operations_are_those_that_torch_counts(tiny, tmp_path, name, flags):
    check(tiny(name), name, tmp_path, flags)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("llama3_v2_5", FROZEN),
        ("llama3_v2_5", {**LORA, "tune_vision": True}),
        ("v4_5", HEAD),
        ("o2_6", {"tune_audio": True}),
    ],
)
def test_operations_of_a_part_that_is_frozen_or_not(tiny, tmp_path, name, flags):
    check(tiny(name), name, tmp_path, flags)


def check(folder, name: str, tmp_path, flags: dict[str, Any]) -> None:
    """Forward and backward pass within 2 %."""
    model, family = trained(folder, name, tmp_path, **flags), family_of(name)
    whole = isinstance(base_model_of(model), NativeModelMixin)
    batch = whole_batch(model) if whole else own_batch(model, audio=family.audio_spec is not None)
    assert expected(model, family, batch) == pytest.approx(counted(model, batch), rel=0.02)


def test_routed_experts_are_counted_as_many_as_see_a_token(tiny, tmp_path):
    """Two of four: half of their weights, beside the router and the shared expert; adapters on them alike."""
    dense = flops_of(trained(tiny("v4_7"), "v4_7", tmp_path), family_of("v4_7"))
    mixture = flops_of(trained(tiny(MIXTURE), MIXTURE, tmp_path), family_of(MIXTURE))
    hidden, layers = 128, 2
    mlp, experts = 3 * hidden * 256, 3 * hidden * 64
    more = 2 * layers * (2 * experts + 4 * hidden + 3 * hidden * 96 + hidden - mlp)
    assert mixture.forward["tokens"] - dense.forward["tokens"] == more


def test_the_tower_that_does_not_merge(tiny, tmp_path):
    """ "4x" runs the window merger on one window, so that all its weights have a gradient."""
    model = trained(tiny("v4_6"), "v4_6", tmp_path)
    model.config.downsample_mode = "4x"
    batch = whole_batch(model)
    with torch.no_grad():
        seen = {name: sum(kinds.values()) for name, kinds in watched(lambda: model(**batch)).items()}
    flops = flops_of(model, by_name("v4_6"))
    counts = {name: int(value) for name, value in flops.counts(batch).items()}
    visual = sum(flops.forward[name] * counts[name] for name in ("patches", "patch_pairs"))
    assert visual == pytest.approx(seen["model.vision_tower"] + seen["model.merger.mlp.0"], rel=0.03)


def test_padding_and_neighbours_do_not_count(tiny, tmp_path):
    """Padded, alone or packed into one row: the same operations, but for the square of the row's length."""
    flops = flops_of(trained(tiny("v4_5"), "v4_5", tmp_path), by_name("v4_5"))
    mask = torch.arange(50)[None] < torch.tensor([50, 20])[:, None]
    padded = {"input_ids": mask.long(), "attention_mask": mask.long(), "labels": torch.where(mask, 1, -100)}
    packed = {
        "input_ids": torch.ones(1, 70),
        "labels": torch.ones(1, 70),
        "cu_seq_lens_q": torch.tensor([0, 50, 70], dtype=torch.int32),
    }
    wanted = {"samples": 2, "tokens": 70, "pairs": 50**2 + 20**2, "labelled": 70}
    for batch in (padded, packed):
        assert flops.counts(batch) == dict.fromkeys(COUNTS, 0) | wanted
    assert flops.counts({**packed, "sources": ["a", "b", "c"]})["samples"] == 3
    whole = {**packed, "cu_seq_lens_q": torch.tensor([0, 70])}
    assert float(flops.counts(whole)["pairs"]) == 70**2
    assert flops.of(wanted) == sum((flops.forward[n] + flops.backward[n]) * k for n, k in wanted.items())


def test_sound_sees_its_own_second_and_what_was_before():
    """Steps in chunks of 4: 4 see 4, 4 see 8, the last two see 10."""
    flops = Flops({}, {}, chunk=4)
    heard = {"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 3), "labels": torch.ones(1, 3)}
    counts = flops.counts({**heard, "audio_lengths": torch.tensor([20, 7])})
    assert (counts["steps"], counts["step_pairs"]) == (10 + 4, 4 * 4 + 4 * 8 + 2 * 10 + 4 * 4)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_only_known_cards_have_a_peak(name, peak):
    assert peak_of(name) == peak


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def text(rows: int = 2) -> dict[str, torch.Tensor]:
    return {name: torch.ones(rows, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask", "labels")}


def made(clock: Clock, ranks: int = 1) -> Throughput:
    flops = Flops({"tokens": 1e12}, {"tokens": 2e12})
    return Throughput(flops, lambda own: own.repeat(ranks, 1), torch.device("cpu"), clock)


def test_waiting_and_pauses_by_a_clock_of_our_own():
    """A batch takes 3 s to arrive and 1 s to train on: three quarters of the time is waiting."""
    clock = Clock()
    throughput = made(clock)
    clock.now += 1000  # loading and wrapping the model

    def slow():
        for _ in range(4):
            clock.now += 3
            yield text()

    batches = throughput.timed(slow())
    for _ in range(2):
        throughput.begin(next(batches))
        clock.now += 1
    clock.now += 50
    throughput.pause(50)
    line = throughput.log()
    assert line == {
        "samples_per_second": 0.5,
        "tokens_per_second": 4.0,
        "data_wait": 0.75,
        "tflops_per_second": 12.0,
    }
    for batch in batches:
        throughput.begin(batch)
        clock.now += 12
    assert throughput.log()["data_wait"] == 0.2, "only what was since the last line"


def test_ranks_are_added_and_their_waiting_is_averaged():
    clock = Clock()
    throughput = made(clock, ranks=4)
    throughput.begin(text())
    clock.now += 2
    throughput.waited(1)
    line = throughput.log()
    assert (line["samples_per_second"], line["tokens_per_second"], line["data_wait"]) == (4, 32, 0.5)


def test_counts_on_a_device_stay_there_until_the_line(monkeypatch):
    """Tensors are added up, not read: reading one would make the CPU wait for the device in every step."""
    flops = Flops({}, {})
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _: pytest.fail("read"))
    batch = {name: tensor.to("meta") for name, tensor in text().items()}
    counts = flops.counts(batch)
    assert isinstance(counts["tokens"], torch.Tensor)
    assert counts["samples"] == 2
