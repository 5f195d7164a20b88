"""Memory estimates against known sizes, manual sums, and measured steps on the CPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_network import SMALL, SMALL_MIXTURE

from finetune.__main__ import main
from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.families import FAMILIES, by_name
from finetune.planning.memory_estimate import GIB, MemoryEstimator
from finetune.planning.meta_model import adapt_meta_model, build_meta_model
from finetune.planning.settings_search import cheapest, gpus_needed
from finetune.planning.training_setup import SampleShape, TrainingSetup
from tools.measured_peak import measured
from tools.memory_doc import HEAD, MIXTURE, MIXTURE_COLUMNS, TAIL, family_row, fitting_row, mixture_row

ROOT = Path(__file__).resolve().parents[2]
# Bytes of the published weights in 16 bit, from their index files.
PUBLISHED = {"v2_0": 6869931584, "llama3_v2_5": 17074184672, "v2_6": 16198350304, "v4_5": 17391790560}
TEXT = SampleShape(tokens=256, items=0)


@cache
def planner(name: str = "v4_5") -> MemoryEstimator:
    return MemoryEstimator(SMALL if name == "small" else by_name(name).published.config)


def test_every_family_has_sizes() -> None:
    for family in FAMILIES:
        assert family.matches(by_name(family.name).published.config)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_parameters_are_the_published_ones(name: str) -> None:
    model = build_meta_model(by_name(name).published.config)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    count = sum(parameter.numel() for parameter in model.parameters())
    known = {"v2_0": 3434965792, "v4_0": 4059533040, "v4_6": 1300659440, "v4_7": 1300659440}
    assert count == known.get(name, count)
    assert 2 * count == PUBLISHED.get(name, 2 * count)


def test_states_by_hand() -> None:
    """2 + 2 + 12 bytes per trained parameter, divided as ZeRO does."""
    count = sum(p.numel() for p in build_meta_model(SMALL).parameters())
    whole = planner("small").resting(TrainingSetup(method="full", stage=2))
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * count, 2 * count, 12 * count)
    second = planner("small").resting(TrainingSetup(method="full", stage=2, gpus=4))
    assert (second.weights, second.gradients, second.optimizer) == (2 * count, -(-2 * count // 4), 3 * count)
    third = planner("small").resting(TrainingSetup(method="full", stage=3, gpus=4))
    assert third.weights == -(-2 * count // 4)
    moved = planner("small").resting(TrainingSetup(method="full", stage=2, offload=True))
    assert (moved.gradients, moved.optimizer, moved.host) == (0, 0, 16 * count)
    alone = planner("small").resting(TrainingSetup(method="full"))
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * count, 4 * count, 8 * count)


def test_adapters_and_frozen_parts() -> None:
    model = planner("small").model(TrainingSetup(stage=2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    resampler = sum(
        p.numel() for name, p in build_meta_model(SMALL).named_parameters() if name.startswith("resampler.")
    )
    adapters = sum(64 * (m + n) * 4 for m, n in ((256, 256), (256, 64), (256, 64), (256, 256)))
    assert trained == resampler + adapters
    lora = planner("small").resting(TrainingSetup(stage=2))
    assert (lora.gradients, lora.optimizer) == (2 * trained, 12 * trained)
    packed = planner("small").resting(TrainingSetup(method="qlora", stage=2))
    linear = 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 768)
    assert lora.weights - packed.weights == pytest.approx(1.484 * linear, rel=0.01)


def test_what_more_costs_and_what_saves() -> None:
    """Each step that should help does, and each that should cost does."""
    base, shape = TrainingSetup(checkpointing=False), SampleShape(tokens=1024, items=4)

    def total(recipe: TrainingSetup = base, at: SampleShape = shape) -> int:
        return planner().memory(recipe, at).total

    again = replace(base, checkpointing=True)
    assert total(again) < 0.9 * total()
    assert total(at=replace(shape, tokens=2048)) > total()
    assert total(at=replace(shape, batch=2)) > total()
    assert total(replace(base, method="qlora")) < total() - 8 * GIB
    trained = replace(base, tune_vision=True)
    assert total(trained) > total() + 2 * GIB, "a trained tower keeps its activations"
    assert total(trained, replace(shape, items=8)) > total(trained) + GIB
    many = replace(shape, items=40)
    assert total(replace(again, vision_batch=4), many) <= total(again, many)
    labels = replace(shape, labelled=1.0)
    assert total(again, labels) - total(again) < 768 * 4096 * 12, "of more labels no logits, only hidden states"


def test_attention_is_linear_in_the_length() -> None:
    """No table of length times length, except the mask of padded rows."""
    blocks = [planner().blocks(TrainingSetup(), SampleShape(tokens=n, items=0)) for n in (1024, 2048, 4096)]
    short, middle, long = (sum(b.saved for b in found) for found in blocks)
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.01)
    one, two = (
        sum(block.saved for block in planner().blocks(TrainingSetup(), SampleShape(tokens=1024, items=0, batch=n)))
        for n in (1, 2)
    )
    assert two > 2 * one + 36 * 2 * 1024 * 1024 * 2 * 0.9


def test_qlora_is_not_partitioned() -> None:
    found = gpus_needed(planner("small"), TEXT, TrainingSetup(gpus=8), "qlora", 24 * GIB)
    assert found is not None
    assert found[0].stage != 3


def test_the_cheapest_is_the_fastest_that_fits() -> None:
    shape = SampleShape(tokens=1024, items=2)
    roomy = cheapest(planner(), shape, TrainingSetup(), "lora", 80 * GIB)
    tight = cheapest(planner(), shape, TrainingSetup(), "lora", 22 * GIB)
    assert roomy is not None
    assert not roomy[0].checkpointing
    assert tight is not None
    assert tight[0].checkpointing
    assert tight[1].total <= 22 * GIB
    assert cheapest(planner(), shape, TrainingSetup(), "lora", 3 * GIB) is None


def test_parts_are_run_again_where_that_is_enough() -> None:
    """Between keeping everything and running all of it again: the tower alone, then the LLM alone."""
    shape, asked = SampleShape(batch=8, tokens=4096, items=10), TrainingSetup(method="full", stage=2)
    kept, vision, llm, everything = (
        planner().memory(replace(asked, checkpointing=parts != (), checkpoint_parts=parts), shape).total
        for parts in ((), ("vision",), ("llm",), None)
    )
    assert everything < min(vision, llm) < max(vision, llm) < kept
    found = cheapest(planner(), shape, asked, "full", vision)
    assert found is not None
    assert found[0].flags()[-2:] == ["--gradient_checkpointing true", "--checkpoint_parts vision"]
    frozen = cheapest(planner(), shape, TrainingSetup(), "lora", planner().memory(TrainingSetup(), shape).total)
    assert frozen is not None
    assert frozen[0].checkpoint_parts is None, "a frozen tower keeps nothing"


IMAGES = SampleShape(tokens=256, items=2, patches=256)


@pytest.mark.parametrize(
    ("config", "recipe", "shape"),
    [
        (SMALL, TrainingSetup(method="full", checkpointing=False), IMAGES),
        (SMALL, TrainingSetup(method="lora", checkpointing=True), replace(IMAGES, batch=2)),
        (SMALL, TrainingSetup(method="lora", checkpointing=True), replace(IMAGES, items=12)),
        (SMALL, TrainingSetup(method="full", checkpoint_parts=("vision",)), IMAGES),
        (SMALL, TrainingSetup(method="full", checkpoint_parts=("llm",)), IMAGES),
        (SMALL_MIXTURE, TrainingSetup(method="full", checkpointing=False), TEXT),
        (SMALL_MIXTURE, TrainingSetup(method="lora", checkpointing=True), replace(IMAGES, batch=2)),
    ],
    ids=[
        *(
            "full",
            "LoRA, layers run again",
            "resampler in two chunks",
            "full, vision run again",
            "full, LLM run again",
        ),
        *("mixture, full, text", "mixture, LoRA, layers run again"),
    ],
)
def test_within_a_fifth_of_a_real_step(config: dict[str, Any], recipe: TrainingSetup, shape: SampleShape) -> None:
    """Every allocation of a training step on the CPU counted."""
    ours = MemoryEstimator(config, torch.float32, gpu=False).memory(recipe, shape)
    total, moving = measured(config, recipe, shape)
    assert ours.total == pytest.approx(total, rel=0.2)
    assert ours.total - ours.weights - ours.optimizer == pytest.approx(moving, rel=0.2)


@pytest.mark.parametrize("family", ["llama3_v2_5", "v4_6"])
@pytest.mark.parametrize("recipe", [TrainingSetup(method="lora", stage=0), TrainingSetup(method="full", stage=2)])
def test_layers_alike_have_the_figures_of_a_trace_of_each(family, recipe, monkeypatch) -> None:
    shape = SampleShape(batch=2, tokens=256, items=2, patches=256)
    some = MemoryEstimator(by_name(family).published.config).blocks(recipe, shape)
    monkeypatch.setattr("finetune.planning.alike_layers._TRACED", 1000)
    assert MemoryEstimator(by_name(family).published.config).blocks(recipe, shape) == some


def test_the_page_is_what_is_generated() -> None:
    """One family of it, as all take a minute; ``python -m tools.memory_doc`` writes it anew."""
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for row in (family_row("v4_5", planner()), fitting_row("v4_5", planner())):
        assert row in page, f"{row}\nis not in docs/memory.md: write it anew"
    assert page.startswith(HEAD)
    assert page.endswith(TAIL)


def test_the_page_has_the_mixture_of_experts() -> None:
    """LoRA alone, as tracing full training takes a while; weights of all experts by hand."""
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    estimator, lora = MemoryEstimator(MIXTURE), MIXTURE_COLUMNS["LoRA"]
    assert mixture_row(estimator, [lora]).removesuffix("|") in page
    experts = 40 * 256 * 3 * 512 * 2048
    rest = estimator.parameters() - experts
    assert 2e9 < rest < 4e9
    assert estimator.resting(lora).weights * 8 == pytest.approx(2 * (experts + rest), rel=0.02)


def test_command_with_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grouped products in 16 bit and, trained in full without DeepSpeed, in fp32."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL_MIXTURE), encoding="utf-8")
    command = ["plan", str(tmp_path), "--method", "full", "--length", "256", "--slices", "1", "--gpu_memory", "8"]
    assert main(command) == 0
    assert "full (everything in full)" in capsys.readouterr().out


def test_adapters_on_experts_are_within_a_fifth_too(tmp_path: Path) -> None:
    """The weights of all experts with the adapters added are kept for the backward pass of every layer."""
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", use_lora=True)
    lora = LoraArguments(lora_r=4, lora_dropout=0.0, lora_target_parameters="experts.gate_up_proj,experts.down_proj")
    recipe = TrainingSetup(method="lora", checkpointing=False)
    model = adapt_meta_model(SMALL_MIXTURE, training, lora, recipe, torch.float32)
    before = {name: id(weight) for name, weight in model.named_parameters()}
    ours = MemoryEstimator(SMALL_MIXTURE, torch.float32, gpu=False, model=model).memory(recipe, TEXT)
    assert before == {name: id(weight) for name, weight in model.named_parameters()}
    total, moving = measured(SMALL_MIXTURE, recipe, TEXT, lora)
    assert ours.total == pytest.approx(total, rel=0.2)
    assert ours.total - ours.weights - ours.optimizer == pytest.approx(moving, rel=0.2)


def test_command_with_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "v4_5", "--method", "lora", "--length", "512", "--slices", "0", "--gpu_memory", "24"]) == 0
    text = capsys.readouterr().out
    assert "MiniCPM-V 4.5, 8,695,895,280 parameters" in text
    assert "--use_lora true" in text
    assert "--model_max_length 512" in text
    assert "GPU peaks were not\nmeasured" in text


def test_command_with_a_folder_of_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    command = ["plan", str(tmp_path), "--method", "full", "--zero", "2", "--length", "64", "--slices", "1"]
    assert main([*command, "--gpu_memory", "80"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " full " in line]
    assert len(rows) == 5
    assert all("ZeRO-2" in row for row in rows)
    assert [row.split()[-10] for row in rows] == ["no", "vision", "llm", "yes", "yes"]
    assert main([*command, "--gpu_memory", "0.5"]) == 1


def test_command_measures_data(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The longest record counts, and of its tokens those that carry loss."""
    texts = ("two", "a red circle on a grey ground", " ".join(["word"] * 60))
    records = [
        {"id": str(i), "conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]}
        for i, text in enumerate(texts)
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records), encoding="utf-8")
    command = ["plan", str(tiny("v2_6")), str(data), "--method", "lora", "--gpu_memory", "8"]
    assert main(command) == 0
    whole = capsys.readouterr().out
    tokens, share, items = (int(x) for x in re.findall(r"1 x (\d+) tokens, (\d+) % .*, (\d+) visual", whole)[0])
    assert tokens > 60
    assert share > 50
    assert items == 0
    assert f"--data_path {data}" in whole
    data.write_text(json.dumps(records[:1]), encoding="utf-8")
    assert main(command) == 0
    assert f"1 x {tokens} tokens" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["v9"], "no such folder"),
        (["v4_5", "data.json"], "give the folder of a checkpoint"),
        (["v4_6", "--tune_vision", "maybe"], "true or false"),
    ],
)
def test_wrong_arguments(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["plan", *words])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert problem in capsys.readouterr().err
