"""Adapters in a conversation: by every loader, several at once, of the first scripts, and of another network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from zoo import gradient

from chat import MiniCPMVChat
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.saving import finish_adapter
from finetune.families import by_name
from finetune.models import CheckpointError, load_adapter, load_model
from finetune.models.adapters import base_model_name
from finetune.tiny.checkpoint_writer import FAMILIES

ASKED: dict[str, Any] = {
    "image": gradient(),
    "msgs": [{"role": "user", "content": "What is this?"}],
    "sampling": False,
    "max_new_tokens": 6,
    "max_slice_nums": 1,
}


def say(model: Any) -> str:
    answer = model.chat(**ASKED)
    return answer[0] if isinstance(answer, tuple) else answer


def shaken(parameters: Any, seed: int, size: float) -> None:
    """Moves weights as a training would, without one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Callable[..., Path]:
    """A finished adapter folder by family, seed and modules saved in full."""

    def make(family: str, seed: int = 1, saved: tuple[str, ...] = ("resampler",), bias: str = "none") -> Path:
        base = resolve_base(str(tiny(family)))
        targets = by_name(family).lora_targets["llm"]
        settings = LoraConfig(r=4, target_modules=targets, modules_to_save=list(saved) or None, bias=bias)  # pyright: ignore
        model = get_peft_model(load_model(base.folder), settings)
        moved = ("lora_B", "modules_to_save", ".bias") if bias != "none" else ("lora_B", "modules_to_save")
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        shaken((p for name, p in trained if any(part in name for part in moved)), seed, 0.3)
        folder = tmp_path_factory.mktemp("adapter") / f"{family}-{seed}-{bias}"
        model.save_pretrained(str(folder))
        finish_adapter(model, folder, base)
        return folder

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_loader_and_the_base_behind_it(tiny, adapter, family):
    saved = ("resampler",) if "resampler" in by_name(family).parts["resampler"] else ()
    folder = adapter(family, saved=saved)
    plain = say(load_model(tiny(family)))
    model = load_model(folder).eval()
    assert isinstance(model, PeftModel)
    answer = say(model)
    assert answer != plain
    with model.disable_adapter():
        assert say(model) == plain
    assert say(model) == answer
    again: Any = load_model(tiny(family))
    assert say(PeftModel.from_pretrained(again, str(folder))) == answer
    automatic: Any = AutoPeftModel.from_pretrained(str(folder)).eval()
    if by_name(family).auto_mapping[0] == "AutoModel":
        assert say(automatic) == answer
    else:  # the class of transformers, which has no chat
        assert not hasattr(automatic, "chat")
    assert say(MiniCPMVChat(folder, device="cpu").model) == answer


def test_several_switched_by_name(tiny, adapter):
    first, second = adapter("llama3_v2_5", 1), adapter("llama3_v2_5", 2, saved=())
    alone = [say(load_model(folder)) for folder in (first, second)]
    plain = say(load_model(tiny("llama3_v2_5")))
    assert len({*alone, plain}) == 3
    model: Any = load_model(first, adapter_name="a")
    load_adapter(model, second, "b")
    assert say(model) == alone[0]
    model.set_adapter("b")
    assert say(model) == alone[1]
    model.set_adapter("a")
    assert say(model) == alone[0]
    with model.disable_adapter():
        assert say(model) == plain
    with pytest.raises(CheckpointError, match="an adapter called 'b' already"):
        load_adapter(model, second, "b")


@pytest.mark.parametrize(("bias", "count"), [("all", 24), ("lora_only", 6)])
def test_trained_biases_go_with_the_adapter(tiny, adapter, bias, count):
    """peft leaves them in the layers of the base; off means the base here, and no second adapter gets them."""
    base = load_model(tiny("v2_6"))
    values = {name: value.clone() for name, value in base.state_dict().items()}
    folder, plain = adapter("v2_6", 1, bias=bias), adapter("v2_6", 2)
    model: Any = load_model(folder, adapter_name="a")

    def changed() -> int:
        own = {
            base_model_name(name): value
            for name, value in model.get_base_model().state_dict().items()
            if ".lora_" not in name and ".modules_to_save." not in name
        }
        return sum(not torch.equal(value, values[name]) for name, value in own.items())

    answer = say(model)
    assert changed() == count
    with model.disable_adapter():
        assert changed() == 0
        assert say(model) == say(base) != answer
    assert changed() == count
    assert say(model) == answer
    with pytest.raises(CheckpointError, match="the adapter 'a' on the model has trained biases"):
        load_adapter(model, plain, "b")
    other: Any = load_model(plain)
    with pytest.raises(CheckpointError, match="beside another adapter: it has trained biases"):
        load_adapter(other, folder, "b")


def recipe(model: Any) -> PeftModel:
    """The guide's load_lora_config."""
    return get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            inference_mode=False,
            r=64,
            lora_alpha=64,
            lora_dropout=0.05,
            target_modules=r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)",
        ),
    )


def first_generation(base: Path, folder: Path) -> tuple[Path, str]:
    """What the first scripts left in OUTPUT_DIR, and what the model said that they trained."""
    model: Any = recipe(load_model(base))
    parts = ("vpm", "resampler", "embed_tokens")
    shaken((p for name, p in model.named_parameters() if "lora_B" in name), 3, 0.1)
    shaken((p for name, p in model.named_parameters() if any(part in name for part in parts)), 4, 0.05)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.eval().save_pretrained(str(folder))
    state = {name: tensor for name, tensor in model.state_dict().items() if any(part in name for part in parts)}
    torch.save(state, folder / "vpm_resampler_embedtokens.pt")
    return folder, say(model)


@pytest.mark.parametrize("family", ["v2_0", "llama3_v2_5"])
def test_adapters_of_the_first_scripts(tiny, tmp_path, family):
    base = tiny(family)
    plain = say(load_model(base))
    folder, trained = first_generation(base, tmp_path / "old")
    assert trained != plain
    model: Any = load_model(folder)
    assert say(model) == trained
    with model.disable_adapter():
        assert say(model) == plain
    assert say(MiniCPMVChat(folder, device="cpu").model) == trained

    model.save_pretrained(str(tmp_path / "new"))  # one file, as adapters are today
    assert say(load_model(tmp_path / "new", base=base)) == trained

    by_hand = recipe(load_model(base)).eval()
    found = by_hand.load_state_dict(torch.load(folder / "vpm_resampler_embedtokens.pt"), strict=False)
    assert found.unexpected_keys == []
    assert say(by_hand) != plain
    given = torch.load(folder / "vpm_resampler_embedtokens.pt", weights_only=True)
    state = by_hand.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in given.items())


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickled_code_is_not_run(tiny, tmp_path, monkeypatch):
    folder, _ = first_generation(tiny("v2_0"), tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    torch.save({"base_model.model.vpm.x": Bomb()}, folder / "vpm_resampler_embedtokens.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors and is not read"):
        load_model(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"base_model.model.llm.lm_head.weight": torch.ones(1)}, "which is not of vpm, resampler, embed_tokens"),
        ({"base_model.model.vpm.pos_embed": torch.ones(0)}, "is empty, as ZeRO-3 leaves it"),
        ({"base_model.model.resampler.query": torch.ones(3, 5)}, r"resampler.query is \(3, 5\) there"),
        ({"base_model.model.resampler.extra": torch.ones(3)}, "resampler.extra"),
    ],
)
def test_odd_files_of_the_first_scripts(tiny, tmp_path, state, message):
    folder, _ = first_generation(tiny("v2_0"), tmp_path / "old")
    torch.save(state, folder / "vpm_resampler_embedtokens.pt")
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(("theirs", "ours"), [("v2_0", "llama3_v2_5"), ("v2_6", "o2_6"), ("v4_6", "v4_5")])
@pytest.mark.parametrize("known", [True, False])
def test_another_family_is_refused(tiny, adapter, tmp_path, theirs, ours, known):
    folder = shutil.copytree(adapter(theirs, saved=()), tmp_path / "adapter")
    file = folder / "adapter_config.json"
    if not known:
        file.write_text(file.read_text().replace(str(tiny(theirs)), "/gone/base"))
        (folder / "run.yaml").write_text("base: somewhere\n")
    same_sizes = (theirs, ours) == ("v2_6", "o2_6")
    if not known and same_sizes:
        return  # nothing in the folder tells them apart
    with pytest.raises(CheckpointError, match=by_name(ours).title) as caught:
        load_model(folder, base=tiny(ours))
    assert (f"{by_name(theirs).title}, {tiny(theirs)}" if known else "/gone/base") in str(caught.value)
    assert str(tiny(ours)) in str(caught.value)
    if known:
        model: Any = load_model(adapter(ours, saved=()))
        with pytest.raises(CheckpointError, match="they are different models"):
            load_adapter(model, folder, "b")
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "resampler.query"])
def test_another_size_is_refused(adapter, tmp_path, part):
    folder = shutil.copytree(adapter("llama3_v2_5"), tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in weights if part in name]:
        rows, columns = weights[name].shape
        smaller = weights[name][:, : columns // 2] if part != "lora_B" else weights[name][: rows // 2]
        weights[name] = smaller.contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"was trained on MiniCPM-Llama3-V 2.5, .* here$"):
        load_model(folder)
