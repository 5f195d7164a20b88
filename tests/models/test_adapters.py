"""peft adapters on the models: train, save, load, merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from visual_batch import FAMILIES, Row, make_batch, prompt, small_model

from finetune.families import by_name
from finetune.models import CheckpointError, MiniCPMV, load_model

ROWS: list[Row] = [(3, [(4, 6)], 5), (6, [], 4), (2, [(3, 3), (5, 2)], 6)]


def trained(base: MiniCPMV, family: str, steps: int = 3, **options) -> PeftModel:
    """An adapter with the official target expression and the whole resampler, a few steps away from its base."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": by_name(family).lora_targets["llm"], "modules_to_save": ["resampler"]}
    model = get_peft_model(base, LoraConfig(**settings | options)).train()
    batch = make_batch(ROWS, base.query_num)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    return model.eval()


def logits(model: torch.nn.Module, queries: int) -> torch.Tensor:
    batch = make_batch(ROWS, queries)
    del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits


def queries_of(model: PeftModel) -> int:
    base = model.get_base_model()
    assert isinstance(base, MiniCPMV)
    return base.query_num


@pytest.mark.parametrize("family", FAMILIES)
def test_train_save_load_merge(family: str, tmp_path: Path) -> None:
    base = small_model(family)
    queries = base.query_num
    plain = logits(base, queries)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters() if not name.startswith("resampler")}
    model = trained(base, family)
    expected = logits(model, queries)
    assert (expected - plain).abs().max() > 0.1
    wrapped = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(wrapped) == 2 * 4
    assert all(".llm." in name for name in wrapped)
    with model.disable_adapter():
        assert torch.equal(logits(model, queries), plain)

    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(small_model(family), str(tmp_path))
    assert torch.equal(logits(again, queries), expected)
    batch = make_batch(ROWS, queries, side="left")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = again.generate(**prompt(batch), **options)

    merged = again.merge_and_unload()
    assert type(merged) is type(base)
    assert torch.allclose(logits(merged, queries), expected, atol=1e-4)
    assert torch.equal(merged.generate(**prompt(batch), **options), tokens)
    assert set(merged.state_dict()) == set(small_model(family).state_dict())
    changed = {n for n, p in merged.named_parameters() if n in frozen and not torch.equal(p, frozen[n])}
    assert changed == {name.removeprefix("base_model.model.") + ".weight" for name in wrapped}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"modules_to_save": ["resampler", "vpm"]}, {"use_dora": True}])
def test_other_settings(family: str, options: dict, tmp_path: Path) -> None:
    base = small_model(family)
    queries = base.query_num
    model = trained(base, family, **options)
    expected = logits(model, queries)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(small_model(family), str(tmp_path))
    assert torch.allclose(logits(again, queries), expected, atol=1e-6)


@pytest.fixture
def adapter(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """An adapter folder on the tiny 2.5 checkpoint, its base recorded by absolute path."""
    base = load_model(tiny("llama3_v2_5"), dtype=torch.float32)
    assert isinstance(base, MiniCPMV)
    trained(base, "llama3_v2_5").save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_load_model_takes_adapter_folders(adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_model("adapter", dtype=torch.float32)
    assert isinstance(model, PeftModel)
    queries = queries_of(model)
    reloaded = logits(model, queries)
    with model.disable_adapter():
        assert (logits(model, queries) - reloaded).abs().max() > 0.1
    on_cpu = load_model(adapter, dtype=torch.float32, device_map={"": "cpu"})
    assert torch.equal(logits(on_cpu, queries), reloaded)


def test_base_beside_the_adapter(adapter: Path, tiny: Callable[[str], Path]) -> None:
    """A relative base is looked up beside the adapter when it is not in the working directory."""
    (adapter.parent / "base").symlink_to(tiny("llama3_v2_5"))
    edit_adapter_config(adapter, base_model_name_or_path="../base")
    assert isinstance(load_model(adapter), PeftModel)


def test_two_sets_of_weights(adapter: Path) -> None:
    (adapter / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors and adapter_model\.bin, which may differ"):
        load_model(adapter)


def edit_adapter_config(adapter: Path, **values) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop_tensor(adapter: Path, part: str) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights[next(name for name in weights if part in name)]
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def add_tensor(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.vpm.extra"] = torch.zeros(1)
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: edit_adapter_config(a, base_model_name_or_path="/gone/base"),
            "the base model /gone/base .* is not there",
        ),
        (lambda a: edit_adapter_config(a, base_model_name_or_path=None), "names no base model"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), r"but not adapter_model\.safetensors"),
        (lambda a: drop_tensor(a, "lora_B"), r"lacks tensors of the adapter: .*lora_B"),
        (lambda a: drop_tensor(a, "resampler.query"), r"lacks tensors of the adapter: .*resampler\.query"),
        (add_tensor, "has 1 tensors that .* does not describe: base_model.model.vpm.extra"),
    ],
    ids=["base gone", "no base", "no weights", "missing lora", "missing module", "surplus"],
)
def test_broken_adapters(adapter: Path, change: Callable[[Path], object], message: str) -> None:
    change(adapter)
    with pytest.raises(CheckpointError, match=message):
        load_model(adapter)


def test_auto_peft_model(adapter: Path) -> None:
    """The published snippet, with the mapping that the trainer writes."""
    mapping = {"base_model_class": "AutoModel", "parent_library": "transformers"}
    edit_adapter_config(adapter, auto_mapping=mapping)
    model = AutoPeftModel.from_pretrained(str(adapter), device_map="auto", trust_remote_code=True)
    assert type(model.get_base_model()) is MiniCPMV
    queries = queries_of(model)
    plain = AutoPeftModel.from_pretrained(str(adapter), dtype=torch.float32)
    assert torch.equal(logits(plain, queries), logits(load_model(adapter, dtype=torch.float32), queries))
