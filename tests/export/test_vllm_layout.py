"""--format vllm: the exported adapter satisfies the rules of vLLM's LoRA loader (docs/export.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_adapters import RESAMPLERS, make_adapter, save
from peft.tuners.lora import Linear
from safetensors.torch import load_file

from finetune.commands.export import main
from finetune.export.vllm_layout import max_lora_rank
from finetune.families import by_name
from finetune.utils.errors import UserError

# A key is the prefix, the module and one of two ends; the module must be called like a linear layer of the model.
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(A|B)\.weight")
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEAR |= {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
# Beginnings of the modules of the language model, the published names -> vLLM's.
LANGUAGE_MODEL = {"v4_5": ("llm.model.", "llm.model."), "v4_6": ("model.language_model.", "language_model.model.")}


# peft warns of tied ends that are trained apart, which is what is tested.
pytestmark = pytest.mark.usefixtures("one_thread", "recwarn")


def export(base: Path, adapter: Path, out: Path) -> int:
    words = ["--model_name_or_path", str(base), "--adapter_name_or_path", str(adapter), "--export_dir", str(out)]
    return main([*words, "--format", "vllm"])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("v4_5", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}, "use_rslora": True}),
        ("v4_5", {"lora_alpha": 6}),
        ("v4_6", {}),
    ],
)
def test_an_adapter_that_vllm_takes(tiny, tmp_path, capsys, family, options):
    base, out = tiny(family), tmp_path / "out"
    found = by_name(family).lora_targets
    saved = [RESAMPLERS.get(family, "resampler"), "embed_tokens"]
    model = make_adapter(
        base, family, target_modules=f"{found['llm']}|{found['vision']}", modules_to_save=saved, **options
    )
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }
    assert export(base, save(model, tmp_path / "adapter"), out) == 0
    said = capsys.readouterr().out
    assert "verified=true" in said
    assert f"--max-lora-rank 8 --lora-modules tuned={out / 'adapter'}" in said

    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] is None
    assert (settings["use_dora"], settings["bias"], settings["rank_pattern"], settings["alpha_pattern"]) == (
        False,
        "none",
        {},
        {},
    )
    assert settings["base_model_name_or_path"] == str(out / "base")
    scale = settings["lora_alpha"] / settings["r"]  # one for all; with use_rslora another divisor
    assert not settings["use_rslora"]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    matches = [KEY.fullmatch(key) for key in tensors]
    modules = {match["module"] for match in matches if match}
    assert len(modules) * 2 == len(tensors)
    assert {module.rpartition(".")[2] for module in modules} <= LINEAR
    here, there = LANGUAGE_MODEL[family]
    assert all(module.replace(here, there).startswith(there) for module in modules)
    assert set(settings["target_modules"]) == modules == {name for name in deltas if name.startswith(here)}
    for module in modules:
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        assert len(a) == b.shape[1] == settings["r"]
        assert (scale * b @ a - deltas[module]).abs().max() < 1e-6

    merged, before = load_file(out / "base" / "model.safetensors"), load_file(base / "model.safetensors")
    changed = {name for name in before if not merged[name].equal(before[name])}
    assert not changed & {f"{module}.weight" for module in modules}
    assert any("embed_tokens" in name for name in changed)
    assert {f"{name}.weight" for name in deltas if name not in modules} <= changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True, "target_modules": r"llm.*q_proj"}, "lora_bias"),
        ({"target_modules": r"vpm.*q_proj"}, "no LoRA in the language model"),
    ],
)
def test_what_vllm_refuses_is_refused_before(tiny, tmp_path, options, message):
    base = tiny("v2_6")
    adapter = save(make_adapter(base, "v2_6", **options), tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        export(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranks(tiny, tmp_path):
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 64, 300, 512)] == [1, 8, 8, 16, 64, 320, 512]
    with pytest.raises(UserError, match="at most 512"):
        max_lora_rank(513)
    with pytest.raises(UserError, match="exactly one adapter"):
        main(["--model_name_or_path", str(tiny("v2_6")), "--export_dir", str(tmp_path / "x"), "--format", "vllm"])
