"""4.7 with a mixture of experts: the stock class's numbers, adapters on fused experts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import CONVERSATIONS, encoder, sample
from made_adapters import EXPERTS, make_adapter, save
from peft import AutoPeftModel
from transformers import AutoModelForImageTextToText
from variants import MIXTURE, family_of

from finetune.arguments.model import LoraArguments
from finetune.arguments.parse import parse_arguments
from finetune.arguments.training import TrainingArguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.saving import finish_adapter
from finetune.encoding.collate import pad
from finetune.models import load_model
from finetune.models.adapters import put_adapter
from finetune.models.kv_cache import CACHE
from finetune.tiny.checkpoint_writer import write_tiny_checkpoint
from finetune.training.flops import flops_of
from finetune.training.freezing import adapt, format_table, part_rows
from finetune.utils.errors import ArgumentError, CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILY = family_of(MIXTURE)
HIDDEN, INSIDE, NUMBER, LAYERS = 128, 64, 4, 2
ROUTED = LAYERS * NUMBER * 3 * HIDDEN * INSIDE
TARGETS = "experts.gate_up_proj, mlp.experts.down_proj"


@pytest.fixture(scope="module")
def batch(tiny: Callable[[str], Path]) -> dict[str, torch.Tensor]:
    made = encoder(tiny(MIXTURE))
    return pad([made.encode(sample(CONVERSATIONS[name])) for name in ("several", "text", "turns")], made.pad_id)


def tuned(folder: Path, tmp_path: Path, *, lora: LoraArguments | None = None) -> Any:
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", use_lora=lora is not None)
    model = adapt(load_model(folder, dtype=torch.float32), FAMILY, training, lora or LoraArguments())
    return model, part_rows(model, FAMILY.parts, training.part_learning_rates)


def on_experts(**more: Any) -> LoraArguments:
    return LoraArguments(**{"lora_r": 4, "lora_dropout": 0.0, "lora_target_parameters": TARGETS, **more})


def test_loss_logits_and_gradients_are_the_stock_ones(tiny, batch) -> None:
    theirs: Any = AutoModelForImageTextToText.from_pretrained(tiny(MIXTURE), dtype=torch.float32)
    model: Any = load_model(tiny(MIXTURE), dtype=torch.float32)
    found = []
    for network in (theirs, model):
        loss = network(**batch).loss
        loss.backward()
        found.append((loss.item(), {name: weight.grad for name, weight in network.named_parameters()}))
    (wanted, expected), (given, ours) = found
    assert given == pytest.approx(wanted, rel=2e-6)
    assert ours.keys() == expected.keys()
    assert all(expected[name].any() for name in expected if ".mlp.experts." in name or ".mlp.gate." in name)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**unlabelled).logits[kept], theirs(**unlabelled).logits[kept])


def test_router_losses_are_as_the_class_has_them(tiny, batch, tmp_path, caplog) -> None:
    """It has none: neither the setting of the text model nor the argument adds one, there or here."""
    losses = []
    for load in (AutoModelForImageTextToText.from_pretrained, load_model):
        network: Any = load(tiny(MIXTURE), dtype=torch.float32)
        for asked in (False, True):
            network.config.text_config.output_router_logits = asked
            network.config.text_config.router_aux_loss_coef = 100.0
            # From 5.24 on the published class cannot put router logits into its output.
            broken = asked and load is not load_model and CACHE == "cache"
            for more in ({}, {"output_router_logits": asked}):
                with torch.no_grad(), pytest.raises(TypeError, match="router_logits") if broken else nullcontext():
                    losses.append(network(**batch, **more).loss.item())
    assert len(losses) >= 6
    assert losses == pytest.approx([losses[0]] * len(losses), rel=2e-6)
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    adapt(network, FAMILY, training, LoraArguments())
    assert "output_router_logits in config.json has no effect" in caplog.text


def test_the_table_tells_active_parameters_and_what_becomes_of_experts(tiny, tmp_path, caplog) -> None:
    caplog.set_level("INFO", "finetune.training.lora")
    _, rows = tuned(tiny(MIXTURE), tmp_path)
    llm = rows[-1] if rows[-1].part == "llm" else next(row for row in rows if row.part == "llm")
    assert llm.total - llm.active == ROUTED // 2
    assert all(row.active == row.total for row in rows if row.part != "llm")
    table = format_table(rows)
    assert f"{llm.total:>15,} {llm.active:>15,} {llm.trainable:>15,}" in table
    assert "active" not in format_table(tuned(tiny("v4_7"), tmp_path)[1])
    assert "experts" not in caplog.text
    _, rows = tuned(tiny(MIXTURE), tmp_path, lora=LoraArguments())
    assert "LoRA r=64, experts frozen" in format_table(rows)
    assert "--lora_target_parameters mlp.experts.down_proj,mlp.experts.gate_up_proj adapts them" in caplog.text
    plain, rows = tuned(tiny(MIXTURE), tmp_path, lora=LoraArguments(lora_r=4, lora_dropout=0.0))
    model, with_experts = tuned(tiny(MIXTURE), tmp_path, lora=on_experts())
    assert "LoRA r=4 + experts" in format_table(with_experts)
    adapters = LAYERS * NUMBER * 4 * (HIDDEN + 2 * INSIDE + INSIDE + HIDDEN)
    added, active = (
        sum(getattr(row, name) for row in with_experts) - sum(getattr(row, name) for row in rows)
        for name in ("trainable", "active")
    )
    assert (added, active) == (adapters, adapters // 2)
    costs = (flops_of(each, FAMILY).forward["tokens"] for each in (model, plain))
    assert next(costs) - next(costs) == 2 * active, "a token meets the adapters of its experts alone"


def test_some_layers_alone(tiny, tmp_path) -> None:
    model, _ = tuned(tiny(MIXTURE), tmp_path, lora=on_experts(lora_layers_to_transform=[1]))
    adapted = {name for name, weight in model.named_parameters() if weight.requires_grad and "experts" in name}
    assert adapted
    assert all(".layers.1." in name for name in adapted)


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        (
            MIXTURE,
            {"lora_target_parameters": "gate_proj"},
            "gate_proj: no weight of experts .* has mlp.experts.down_proj",
        ),
        (MIXTURE, {"lora_layers_to_transform": [7]}, "no weight of experts is called so"),
        ("v4_7", {}, "experts.gate_up_proj: no weight of experts is called so; the llm of this MiniCPM-V 4.7 has none"),
    ],
)
def test_names_that_match_nothing_are_refused(tiny, tmp_path, name, lora, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        tuned(tiny(name), tmp_path, lora=on_experts(**lora))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--lora_target_parameters x puts adapters on parameters: it needs --use_lora true"),
        ("--use_lora true", "--lora_dropout 0.05: .*use --lora_dropout 0"),
        ("--use_lora true --lora_dropout 0 --use_dora true", "peft has no DoRA for parameters"),
        ("--use_lora true --lora_dropout 0 --lora_layer_replication [[0,1]]", "repeated layers"),
    ],
)
def test_what_does_not_go_with_it_is_refused(flags: str, message: str) -> None:
    given = ["--model_name_or_path", "m", "--data_path", "d", "--lora_target_parameters", "x", *flags.split()]
    with pytest.raises(ArgumentError, match=message):
        parse_arguments(given)


def test_an_adapter_on_experts_loads_anywhere_and_only_where_it_fits(tiny, batch, tmp_path) -> None:
    model = make_adapter(tiny(MIXTURE), MIXTURE, target_parameters=[*EXPERTS, "mlp.gate.weight"])
    folder = save(model, tmp_path / "adapter")
    finish_adapter(model, folder, resolve_base(str(tiny(MIXTURE))))
    batch = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        wanted = model(**batch).logits
        for again in (load_model(folder), AutoPeftModel.from_pretrained(folder)):
            assert torch.equal(again.eval()(**batch).logits, wanted)
        with again.disable_adapter():  # pyright: ignore[reportCallIssue]
            assert not torch.allclose(again(**batch).logits, wanted, atol=1e-2)
    other = write_tiny_checkpoint("v4_7", tmp_path / "other", experts=6)
    with pytest.raises(CheckpointError, match=r"does not fit MiniCPM-V 4.7.*mlp.experts.* 6 experts here"):
        put_adapter(load_model(other), folder)
    with pytest.raises(CheckpointError, match="does not fit MiniCPM-V 4.7"):
        put_adapter(load_model(tiny("v4_7")), folder)
