"""What docs/export.md says of vLLM's loader of adapters, said by the loader itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import servers
from made_adapters import make_adapter, save

from finetune.tiny.checkpoint_writer import write_tiny_checkpoint

LLM = r"llm\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_checkpoint("v2_6", tmp_path_factory.mktemp("base") / "v2_6")


def loader_says(*adapters: tuple[Path, int]) -> list[dict[str, object]]:
    """What vLLM's loader makes of adapters with a value of --max-lora-rank each."""
    argv = [str(servers.VLLM_PYTHON), str(Path(__file__).with_name("vllm_lora_loader.py"))]
    argv += [word for folder, rank in adapters for word in (str(folder), str(rank))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_what_it_refuses_and_what_it_reads(base: Path, tmp_path: Path) -> None:
    def made(name: str, **options) -> Path:
        return save(make_adapter(base, "v2_6", **{"r": 4, "target_modules": LLM, **options}), tmp_path / name)

    adapters = {
        "plain": (made("plain"), 8),
        "resampler": (made("resampler", modules_to_save=["resampler"]), 8),
        "dora": (made("dora", use_dora=True), 8),
        "lora_bias": (made("lora_bias", lora_bias=True), 8),
        "bias": (made("bias", bias="all"), 8),
        "rank": (made("rank", r=16), 8),
        "pattern": (made("pattern", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 12}), 8),
        "slora": (made("slora", use_rslora=True, lora_alpha=8), 8),
        "expression": (made("expression", target_modules=r"llm.*q_proj"), 8),
        "tower": (made("tower", target_modules=r"vpm.*fc1"), 8),
    }
    said = dict(zip(adapters, loader_says(*adapters.values()), strict=True))
    errors = {name: str(value.get("error", "")) for name, value in said.items()}
    assert said["plain"] == {"ranks": [4], "scales": [2.0]}
    assert "Unsupported modules_to_save: ['resampler']" in errors["resampler"]
    assert "does not yet support DoRA" in errors["dora"]
    assert "does not support LoRA bias" in errors["lora_bias"]
    assert "Adapter bias is not supported" in errors["bias"]
    assert "LoRA rank 16 is greater than max_lora_rank 8" in errors["rank"]
    assert said["pattern"] == {"ranks": [2, 4], "scales": [2.0, 3.0, 4.0]}
    assert said["slora"] == {"ranks": [4], "scales": [4.0]}
    assert said["expression"] == {"ranks": [4], "scales": [2.0]}
    assert "expected target modules in" in errors["tower"]


def test_only_some_values_are_maximum_ranks(base: Path, tmp_path: Path) -> None:
    folder = save(make_adapter(base, "v2_6", r=2, target_modules=LLM), tmp_path / "adapter")
    allowed = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    said = loader_says(*((folder, rank) for rank in (2, 48, 1024, *allowed[1:])))
    assert all("Input should be 1, 8, 16, 32, 64, 128, 256, 320 or 512" in str(each["error"]) for each in said[:3])
    assert said[3:] == [{"ranks": [2], "scales": [4.0]}] * len(allowed[1:])
