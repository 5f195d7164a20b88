"""The layer-by-layer merge equals peft's merge_and_unload, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_adapters import EXPERTS, make_adapter, save
from safetensors.torch import load_file, save_file
from variants import MIXTURE

from finetune.checkpoints.safetensors_io import read_tensor, stored_in
from finetune.export.lora_merge import BaseTensors, MergedTensors, empty_model
from finetune.export.sharded_writer import WeightFiles
from finetune.families import by_name
from finetune.model_folders.checkpoint_folder import weight_files
from finetune.models.adapters import put_adapter
from finetune.models.loading import load_model
from finetune.utils.errors import CheckpointError

# The first has untied ends and layers with biases; the second ties them, and its tensors have transformers' names.
FAMILIES = ("v2_6", "v4_6")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True, "target_modules": ["fc1", "fc2"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both-ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora-embeddings": {"target_modules": ["embed_tokens"]},
}

# Fused weights of a mixture: both of a module, one of them, and a router, which has two dimensions.
ON_EXPERTS: dict[str, dict[str, Any]] = {
    "experts": {"target_parameters": EXPERTS, "use_rslora": True},
    "down-projections": {"target_parameters": EXPERTS[1:], "bias": "all"},
    "routers": {"target_parameters": [*EXPERTS, "mlp.gate.weight"]},
}


# peft warns of tied ends that are trained apart, which is what is tested.
pytestmark = pytest.mark.usefixtures("one_thread", "recwarn")


def merge(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """What an export writes, in several files."""
    out.mkdir()
    weights = MergedTensors(BaseTensors(base), empty_model(base), adapter)
    assert WeightFiles(weights, dtype=None, shard_size=400_000).write(out) > 3
    return {name: read_tensor(stored) for name, stored in stored_in(weight_files(out)).items()}


# Where the ends are tied, peft adds LoRA of one of them to both; see below, and the round trips of the command.
CASES = [(family, variant) for family in FAMILIES for variant in VARIANTS]
CASES.remove(("v4_6", "lora-embeddings"))
CASES += [(MIXTURE, variant) for variant in ("plain", *ON_EXPERTS)]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_equal_to_peft(tiny, tmp_path, family, variant):
    base = tiny(family)
    model = make_adapter(base, family, **{**VARIANTS, **ON_EXPERTS}[variant])
    found = merge(base, save(model, tmp_path / "adapter"), tmp_path / "out")
    merged: Any = model.merge_and_unload()
    expected = merged.state_dict()
    stored = {name: read_tensor(where) for name, where in stored_in(weight_files(base)).items()}
    assert set(found) <= set(expected)
    assert set(stored) <= set(found)
    tied = set(expected) - set(found)
    assert tied <= {"lm_head.weight"}
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-6), name
    for name in tied:
        assert torch.equal(expected[name], found["model.language_model.embed_tokens.weight"])
    changed = {name for name in found if name not in stored or not torch.equal(found[name], stored[name])}
    assert changed


def test_lora_on_a_tied_output_layer_leaves_the_embeddings(tiny, tmp_path):
    """Peft would change them too, as it adds to the tensor that both share."""
    base = tiny("v4_6")
    model = make_adapter(base, "v4_6", target_modules=["lm_head"])
    adapter = save(model, tmp_path / "adapter")
    found = merge(base, adapter, tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.lm_head.lora_{side}.weight"] for side in "AB")
    scale = model.peft_config["default"].lora_alpha / 2  # pyright: ignore[reportAttributeAccessIssue]
    before = load_file(base / "model.safetensors")["model.language_model.embed_tokens.weight"]
    assert torch.equal(found["model.language_model.embed_tokens.weight"], before)
    assert torch.allclose(found["lm_head.weight"], before + scale * b @ a, atol=1e-6)


def test_adapters_of_the_first_scripts(tiny, tmp_path):
    base = tiny("llama3_v2_5")
    model = make_adapter(
        base, "llama3_v2_5", target_modules=by_name("llama3_v2_5").lora_targets["llm"], modules_to_save=["resampler"]
    )
    adapter = save(model, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    beside = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    assert beside
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".lora_" in name}, adapter / "adapter_model.safetensors"
    )
    named = {name.replace(".resampler.", ".resampler.modules_to_save.default."): t for name, t in beside.items()}
    torch.save(named, adapter / "vpm_resampler_embedtokens.pt")
    settings = adapter / "adapter_config.json"
    settings.write_text(
        settings.read_text().replace('"modules_to_save": [\n    "resampler"\n  ]', '"modules_to_save": null')
    )
    found = merge(base, adapter, tmp_path / "out")
    expected: Any = put_adapter(load_model(base), adapter).merge_and_unload()  # pyright: ignore[reportArgumentType]
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name
    assert torch.equal(found["resampler.query"], beside["base_model.model.resampler.query"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"init_lora_weights": "pissa"}, "changes the weights of the base"),
        ({"peft_type": "VERA"}, "the one kind of adapter"),
    ],
)
def test_what_cannot_be_merged_is_refused(tiny, tmp_path, options, message):
    base = tiny("v2_6")
    adapter = save(make_adapter(base, "v2_6", target_modules=["q_proj"]), tmp_path / "adapter")
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | options))
    with pytest.raises(CheckpointError, match=message):
        MergedTensors(BaseTensors(base), empty_model(base), adapter)


def test_misfits_and_damage_are_named(tiny, tmp_path):
    base = tiny("v2_6")
    adapter = save(make_adapter(base, "v2_6", target_modules=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not fit"):
        MergedTensors(BaseTensors(tiny("v2_0")), empty_model(tiny("v2_0")), adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match="lacks tensors"):
        MergedTensors(BaseTensors(base), empty_model(base), adapter)
    save_file({key: tensor * float("nan") for key, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match="not finite"):
        merge(base, adapter, tmp_path / "out")
