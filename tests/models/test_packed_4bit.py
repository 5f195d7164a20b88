"""Folders that bitsandbytes stored in 4 bit: loaded strictly, equal to QLoRA of their base, refused where damaged."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_folders import PUBLISHED, WHOLE, quantisation_as, write_packed
from peft import AutoPeftModel, PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from finetune.arguments.model import LoraArguments
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.saving import finish_adapter
from finetune.families import by_name
from finetune.models import CheckpointError, load_model
from finetune.models.packed_4bit import prepare_4bit
from finetune.training.freezing import numel
from finetune.training.lora import add_lora, quantisation

Linear4bit: Any = pytest.importorskip("bitsandbytes.nn.modules").Linear4bit

FAMILIES = ("llama3_v2_5", "v2_6", "v4_5", "v4_6")
IDS = torch.arange(10, 40)[None]
FIRST = "llm.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """A folder in 4 bit by family; callers must not write into it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = write_packed(tiny(family), tmp_path_factory.mktemp("packed") / f"{family}-int4")
        return made[family]

    return make


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    """A folder of 2.6 in 4 bit to write into."""
    return Path(shutil.copytree(packed("v2_6"), tmp_path / "copy"))


def in_4bit(model: torch.nn.Module) -> set[str]:
    """Names of the weights in 4 bit."""
    return {name for name, value in model.named_parameters() if getattr(value, "quant_state", None) is not None}


def loss(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS.clone()).loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_gives_what_its_base_gives_quantised_on_loading(tiny, packed, family, dtype):
    stored = load_model(packed(family), dtype=dtype)
    kind = getattr(torch, dtype)
    made = load_model(
        tiny(family), dtype=dtype, quantization_config=quantisation_as(WHOLE, bnb_4bit_compute_dtype=kind)
    )
    assert in_4bit(stored) == in_4bit(made) != set()
    assert {value.dtype for value in stored.parameters()} == {kind, torch.uint8}
    if dtype == "float32":
        assert torch.equal(loss(stored), loss(made))
    else:  # quantised from float32 there, from rounded weights here
        assert torch.allclose(loss(stored), loss(made), rtol=1e-2)
    assert sum(map(numel, stored.parameters())) == sum(map(numel, load_model(tiny(family)).parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_the_folder_is_qlora_of_its_base(tiny, tmp_path, family):
    """Both quantised in the way of --q_lora: equal losses and gradients over two steps."""
    values, parts = [], by_name(family)
    q_lora = quantisation("float32")
    load_model(tiny(family), dtype=torch.float32, quantization_config=q_lora).save_pretrained(tmp_path)
    for path in tiny(family).iterdir():
        if not (tmp_path / path.name).exists() and path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    for folder, quantise in ((tmp_path, None), (tiny(family), q_lora)):
        model = load_model(folder, dtype=torch.float32, quantization_config=quantise)
        model.requires_grad_(False)
        torch.manual_seed(0)
        model = add_lora(model, parts, list(parts.parts["resampler"]), LoraArguments(lora_r=4, lora_dropout=0))
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            found = loss(model)
            found.backward()
            optimizer.step()
            values.append(found.detach())
    assert torch.equal(torch.stack(values[:2]), torch.stack(values[2:]))
    assert values[0] != values[1]


@pytest.mark.parametrize("family", ["v2_6", "v4_6"])
def test_an_adapter_loads_on_its_folder_and_on_the_unquantised_base(tiny, packed, tmp_path, family):
    model = add_lora(load_model(packed(family), dtype=torch.float32), by_name(family), [], LoraArguments(lora_r=4))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(1))
    model.eval()
    model.save_pretrained(tmp_path)
    finish_adapter(model, tmp_path, resolve_base(str(packed(family))))
    auto = AutoPeftModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        config = PeftConfig.from_pretrained(tmp_path)
        assert in_4bit(auto)
        prepare_4bit(auto, torch.float32)  # the class of transformers that peft loads 4.6 with leaves it in float16
        assert torch.allclose(loss(auto), loss(model), rtol=1e-6)
        whole: Any = load_model(tmp_path, base=tiny(family), dtype=torch.float32).eval()
        config.base_model_name_or_path = str(tiny(family))
        config.save_pretrained(str(tmp_path))
        by_peft = AutoPeftModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert not in_4bit(whole)
        assert not in_4bit(by_peft)
        assert torch.allclose(loss(whole), loss(by_peft), rtol=1e-6)
        with whole.disable_adapter():
            off = loss(whole)
        assert not torch.allclose(off, loss(whole))
    adapters = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    assert all(torch.equal(value, adapters[name]) for name, value in whole.named_parameters() if ".lora_" in name)


def test_the_published_list_of_whole_layers_packs_the_vision_tower_and_not_the_resampler(tiny, tmp_path):
    folder = write_packed(tiny("llama3_v2_5"), tmp_path / "int4", PUBLISHED)
    parts = {name.partition(".")[0] for name in in_4bit(load_model(folder))}
    assert parts == {"llm", "vpm"}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == list(PUBLISHED)


def test_auto_keeps_the_types_of_the_folder(packed):
    model: Any = AutoModel.from_pretrained(packed("v2_6"))
    assert {value.dtype for value in model.parameters()} == {torch.float32, torch.uint8}
    assert model.get_submodule(FIRST.removesuffix(".weight")).compute_dtype == torch.float16


def test_shards_and_fp4_load(tiny, tmp_path):
    other = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    folder = write_packed(tiny("v2_6"), tmp_path / "fp4", max_shard_size="200KB", **other)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert in_4bit(load_model(folder))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: change_weights(f, lambda w: w.pop(f"{FIRST}.absmax")),
            r"q_proj\.weight\.absmax is missing beside .*download the folder again",
        ),
        (
            lambda f: change_weights(f, lambda w: w.pop(f"{FIRST}.nested_quant_map")),
            r"q_proj\.weight\.nested_quant_map is missing beside",
        ),
        (lambda f: change_weights(f, lambda w: w.pop(FIRST)), r"q_proj\.weight is missing beside"),
        (
            lambda f: change_weights(f, lambda w: w.update({"resampler.query": w["resampler.query"].to(torch.uint8)})),
            r"resampler\.query is of type U8",
        ),
        (
            lambda f: change_weights(f, lambda w: w[f"{FIRST}.nested_absmax"].fill_(float("nan"))),
            r"q_proj\.weight\.nested_absmax has values that are not finite",
        ),
        (
            lambda f: change_config(f, llm_int8_skip_modules=["lm_head", "llm"]),
            "14 tensors have another shape: llm|in 4 bit in the weight files, but whole by",
        ),
        (
            lambda f: change_config(f, llm_int8_skip_modules=["lm_head"]),
            r"resampler\.attn\.out_proj\.weight is whole in the",
        ),
        (lambda f: change_config(f, load_in_4bit=False), "quantization_config of bitsandbytes, but not in 4 bit"),
        (lambda f: change_config(f, quant_method="gptq"), "quantization_config of gptq.*Use openbmb/MiniCPM-V-2_6"),
        (
            lambda f: change_weights(
                f, lambda w: [w.pop(name) for name in list(w) if ".weight." in name or w[name].dtype == torch.uint8]
            ),
            "says that weights are stored in 4 bit, but the weight files have none",
        ),
    ],
    ids=["table", "nested", "weight", "type", "finite", "skipped", "packed", "8bit", "gptq", "none"],
)
def test_damaged_and_other_folders_are_refused(copy, change, message):
    change(copy)
    with pytest.raises(CheckpointError, match=message):
        load_model(copy)


def test_without_bitsandbytes_it_is_said_what_to_install(packed, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    with pytest.raises(CheckpointError, match=r"needs bitsandbytes: pip install -e '\.\[quant\]'"):
        load_model(packed("v2_6"))
    assert resolve_base(str(packed("v2_6"))).in_4bit  # data is checked without it


def test_layers_that_bitsandbytes_cannot_repack_compute_all_the_same(packed):
    """For CPUs with AVX-512 BF16 it repacks the weights in evaluation, 32 outputs at a time."""
    model: Any = load_model(packed("v4_6"), dtype=torch.float32)
    narrow = [layer for layer in model.modules() if isinstance(layer, Linear4bit) and layer.out_features % 32]
    assert narrow
    assert not any(layer.support_avx512bf16_for_cpu for layer in narrow)
    with torch.no_grad():
        assert model.eval()(input_ids=IDS).logits.isfinite().all()
