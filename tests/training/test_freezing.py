"""The trainable parameters of each combination of flags, and the table that is logged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import finetune.models  # noqa: F401 - registers the models
from finetune.arguments.model import LoraArguments
from finetune.arguments.training import TrainingArguments
from finetune.families import by_name, usable
from finetune.families.common import REMOTE_CODE_PARTS
from finetune.models import load_model
from finetune.training.freezing import adapt, counted, describe_parameters, part_of, part_rows
from finetune.utils.errors import ArgumentError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def arguments(tmp_path: Path, **flags) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **flags)


def batch(model) -> dict[str, torch.Tensor]:
    """Two rows, one with a 2 x 3 patch image."""
    queries = model.config.query_num
    length = queries + 6
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (2, length), generator=generator)
    labels = ids.clone()
    labels[:, : queries + 3] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length).repeat(2, 1),
        "labels": labels,
        "patches": torch.randint(0, 256, (6, 588), generator=generator, dtype=torch.uint8),
        "tgt_sizes": torch.tensor([[2, 3]]),
        "image_bound": torch.tensor([[0, 2, 2 + queries]]),
        "temporal_ids": torch.tensor([-1]),
    }


FULL = [
    ({}, {"vision": "full", "resampler": "full", "llm": "full"}),
    ({"tune_vision": False}, {"vision": "frozen", "resampler": "full", "llm": "full"}),
    ({"tune_llm": False}, {"vision": "full", "resampler": "full", "llm": "frozen"}),
    ({"tune_resampler": False, "tune_vision": False}, {"vision": "frozen", "resampler": "frozen", "llm": "full"}),
    ({"tune_llm": False, "tune_vision": False}, {"vision": "frozen", "resampler": "full", "llm": "frozen"}),
    ({"use_lora": True}, {"vision": "frozen", "resampler": "full", "llm": "LoRA r=64"}),
    ({"use_lora": True, "tune_vision": True}, {"vision": "full", "resampler": "full", "llm": "LoRA r=64"}),
    ({"use_lora": True, "tune_resampler": False}, {"vision": "frozen", "resampler": "frozen", "llm": "LoRA r=64"}),
    (
        {"use_lora": True, "lora_parts": ["llm", "vision"]},
        {"vision": "LoRA r=64", "resampler": "full", "llm": "LoRA r=64"},
    ),
    (
        {"use_lora": True, "lora_parts": ["vision", "resampler"]},
        {"vision": "LoRA r=64", "resampler": "LoRA r=64", "llm": "frozen"},
    ),
]


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5"])
@pytest.mark.parametrize(("flags", "modes"), FULL, ids=lambda value: "-".join(map(str, value)) or "default")
def test_flags_train_what_the_table_says(tiny, tmp_path, family, flags, modes):
    training = arguments(tmp_path, **flags)
    model = adapt(load_model(tiny(family), dtype=torch.float32), by_name(family), training, LoraArguments())
    rows = part_rows(model, REMOTE_CODE_PARTS, training.part_learning_rates)
    assert {row.part: row.mode for row in rows} == modes

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(2):  # LoRA's A has no gradient before B has moved
        optimizer.zero_grad()
        model(**batch(model)).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved <= trained, "a frozen parameter moved"
    # The key bias of an attention has a mathematically zero gradient, and unused rows of tables get none.
    still = {name for name in trained - moved if not name.endswith(("k_proj.bias", "pos_embed"))}
    assert not still, "declared trainable, but did not move"
    assert {part_of(name, REMOTE_CODE_PARTS) for name in moved} == {
        part for part, mode in modes.items() if mode != "frozen"
    }
    if not training.use_lora:
        assert "resampler.pos_embed" not in trained, "a table is trained"
    elif training.lora_parts == ["llm"]:
        adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
        assert adapted == set(ATTENTION)
        assert not any("embed_tokens" in name for name in trained)


def test_total_counts_saved_copies_once(tiny, tmp_path):
    base = load_model(tiny("llama3_v2_5"), dtype=torch.float32)
    size = sum(p.numel() for p in base.parameters())
    training = arguments(tmp_path, use_lora=True, tune_vision=True)
    model = adapt(base, by_name("llama3_v2_5"), training, LoraArguments(lora_r=4, lora_modules_to_save="embed_tokens"))
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert (
        sum(row.total for row in part_rows(model, REMOTE_CODE_PARTS, training.part_learning_rates)) == size + adapters
    )
    assert part_rows(model, REMOTE_CODE_PARTS, training.part_learning_rates)[2].mode == "LoRA r=4 + embed_tokens"


def test_published_log_of_v2_0(tmp_path):
    """seeds: Total 3458558752, Trainable 733677856 for V-2.0 with LoRA r 64 on q and k, vision and embed_tokens."""
    from transformers import AutoConfig, AutoModel

    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**by_name("v2_0").published.config, "torch_dtype": "bfloat16"}))
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        training = arguments(tmp_path, use_lora=True, tune_vision=True)
        lora = LoraArguments(
            lora_target_modules=r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj)", lora_modules_to_save="embed_tokens"
        )
        model = adapt(model, by_name("v2_0"), training, lora)
    rows = part_rows(model, REMOTE_CODE_PARTS, training.part_learning_rates)
    assert sum(row.total for row in rows) == 3_458_558_752
    assert sum(row.trainable for row in rows) == 733_677_856


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(ArgumentError, match=r"lora_parts vision .* choose one"):
        arguments(tmp_path, use_lora=True, lora_parts=["llm", "vision"], tune_vision=True)
    with pytest.raises(ArgumentError, match="choose one"):
        arguments(tmp_path, use_lora=True, tune_llm=True)
    with pytest.raises(ArgumentError, match="nothing would be trained"):
        arguments(tmp_path, tune_llm=False, tune_vision=False, tune_resampler=False)


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5"])
def test_all_linear_layers_of_chosen_parts(tiny, tmp_path, family):
    training = arguments(tmp_path, use_lora=True, lora_parts=["llm", "vision"])
    model = load_model(tiny(family))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    model = adapt(model, by_name(family), training, LoraArguments(lora_target_modules="all-linear"))
    adapted = {
        n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in model.named_parameters() if "lora_A" in n
    }
    assert adapted == {name for name in linear if name.startswith(("llm.model.", "vpm."))}


@pytest.mark.parametrize("family", usable(), ids=lambda family: family.name)
def test_adapters_in_every_part_of_every_generation(tiny, tmp_path, family):
    parts = list(family.lora_targets)
    assert set(parts) == set(family.parts)
    training = arguments(tmp_path, use_lora=True, lora_parts=parts)
    for targets in (None, "all-linear"):
        model = adapt(load_model(tiny(family.name)), family, training, LoraArguments(lora_target_modules=targets))
        modes = {row.part: row.mode for row in part_rows(model, family.parts, training.part_learning_rates)}
        assert modes == dict.fromkeys(parts, "LoRA r=64")


def test_a_part_that_the_family_lacks_is_refused(tiny, tmp_path):
    model = load_model(tiny("v2_0"))
    with pytest.raises(ArgumentError, match="has no audio part"):
        adapt(model, by_name("v2_0"), arguments(tmp_path, use_lora=True, lora_parts=["audio"]), LoraArguments())
    with pytest.raises(ArgumentError, match="has no audio part"):
        adapt(model, by_name("v2_0"), arguments(tmp_path, tune_audio=True), LoraArguments())


def test_a_target_that_matches_nothing_is_refused(tiny, tmp_path):
    model = load_model(tiny("llama3_v2_5"))
    for targets, message in ((r"llm\..*\.q_prj", "matches no module"), ("v_proj,q_prj", "is called q_prj; there are")):
        with pytest.raises(ArgumentError, match=message):
            adapt(
                model,
                by_name("llama3_v2_5"),
                arguments(tmp_path, use_lora=True),
                LoraArguments(lora_target_modules=targets),
            )
    with pytest.raises(ArgumentError, match="no module of that name"):
        adapt(
            model,
            by_name("llama3_v2_5"),
            arguments(tmp_path, use_lora=True),
            LoraArguments(lora_modules_to_save="embed_token"),
        )


def test_trainable_weights_and_norms_become_fp32_and_other_frozen_ones_stay(tiny, tmp_path):
    training = arguments(tmp_path, use_lora=True)
    model = load_model(tiny("llama3_v2_5"), dtype=torch.bfloat16)
    model = adapt(model, by_name("llama3_v2_5"), training, LoraArguments())
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {name: p.dtype for name, p in counted(model) if not p.requires_grad}
    norms = {name for name in frozen if ".vpm." in name and "norm" in name}
    assert norms
    assert trained == {frozen[name] for name in norms} == {torch.float32}
    assert {dtype for name, dtype in frozen.items() if name not in norms} == {torch.bfloat16}


def test_adapter_off_is_the_base(tiny, tmp_path):
    base = load_model(tiny("v2_0"), dtype=torch.float32)
    inputs = batch(base)
    inputs.pop("labels")
    with torch.no_grad():
        expected = base.eval()(**inputs).logits
    model = adapt(copy.deepcopy(base), by_name("v2_0"), arguments(tmp_path, use_lora=True), LoraArguments())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(("lora_B.default.weight", "default.proj")):
                parameter.add_(0.5)
        model.eval()
        changed = model(**inputs).logits
        assert isinstance(model, PeftModel)
        with model.disable_adapter():
            off = model(**inputs).logits
    assert (changed - expected).abs().max() > 1e-2
    assert torch.equal(off, expected)


@pytest.mark.parametrize(
    ("family", "prefix"), [("v2_0", "llm.model.layers."), ("v4_6", "model.language_model.layers.")]
)
@pytest.mark.parametrize(("count", "trained"), [(1, {"1"}), (-1, {"0"}), (2, {"0", "1"})])
def test_some_layers_of_the_llm(tiny, tmp_path, family, prefix, count, trained):
    model = load_model(tiny(family))
    flags = arguments(tmp_path, tune_llm_layers=count, tune_vision=False, tune_resampler=False)
    adapt(model, by_name(family), flags, LoraArguments())
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.startswith(prefix) for name in names)
    assert {name.removeprefix(prefix).split(".")[0] for name in names} == trained
    assert "frozen" in describe_parameters(model)


def test_more_layers_than_there_are(tiny, tmp_path):
    with pytest.raises(ArgumentError, match="--tune_llm_layers 3: the LLM of MiniCPM-V 2.0 has 2 layers"):
        adapt(load_model(tiny("v2_0")), by_name("v2_0"), arguments(tmp_path, tune_llm_layers=3), LoraArguments())
    with pytest.raises(ArgumentError, match="cannot be 0 or combined with --use_lora true"):
        arguments(tmp_path, tune_llm_layers=3, use_lora=True)


def test_names_are_targets_in_the_adapted_parts_alone(tiny, tmp_path):
    """The vision tower has projections of the same names."""
    model = load_model(tiny("v2_6"))
    flags = arguments(tmp_path, use_lora=True, tune_resampler=False)
    adapted = adapt(model, by_name("v2_6"), flags, LoraArguments(lora_target_modules="q_proj, mlp.up_proj"))
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in names_of_adapters(adapted)}
    inside = "llm.model.layers"
    assert layers == {f"{inside}.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}


def names_of_adapters(model) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def test_biases_are_named(tiny, tmp_path, caplog):
    """peft trains the biases of frozen parts with ``all``: the table and a warning say so."""
    training = arguments(tmp_path, use_lora=True, tune_vision=False, tune_resampler=False)
    rows = {}
    for bias in ("all", "lora_only", "none"):
        caplog.clear()
        model = adapt(load_model(tiny("v2_6")), by_name("v2_6"), training, LoraArguments(lora_r=4, lora_bias=bias))
        rows[bias] = {row.part: row.mode for row in part_rows(model, REMOTE_CODE_PARTS, training.part_learning_rates)}
        assert ("frozen otherwise: resampler, vision." in caplog.text) == (bias == "all")
    assert rows == {
        "all": {"vision": "biases", "resampler": "biases", "llm": "LoRA r=4 + biases"},
        "lora_only": {"vision": "frozen", "resampler": "frozen", "llm": "LoRA r=4 + biases"},
        "none": {"vision": "frozen", "resampler": "frozen", "llm": "LoRA r=4"},
    }


def test_tied_ends_that_part_are_named(tiny, tmp_path, caplog, recwarn):
    training = arguments(tmp_path, use_lora=True, tune_vision=False, tune_resampler=False)
    for family, saved, said in (
        ("v4_6", "embed_tokens", True),
        ("v4_6", "embed_tokens,lm_head", False),
        ("v2_6", "embed_tokens", False),
    ):
        caplog.clear()
        lora = LoraArguments(lora_r=4, lora_modules_to_save=saved)
        adapt(load_model(tiny(family)), by_name(family), training, lora)
        assert ("embed_tokens: it is one tensor with lm_head in this checkpoint" in caplog.text) == said
    assert not [warning for warning in recwarn if "ensure_weight_tying" in str(warning.message)]
