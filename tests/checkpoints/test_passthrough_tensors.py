"""Tensors that the model does not build are copied unchanged from the base into results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.checkpoints.passthrough_tensors import copy_passthrough_tensors
from finetune.checkpoints.saving import finish_full
from finetune.models import load_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "forward"
TTS = {
    "tts.emb_text.weight": torch.randn(5, 3).bfloat16(),
    "tts.dvae.coef": torch.randn(1, 100, 1),
    "tts.steps": torch.tensor(7),
    "tts.empty": torch.zeros(0, 4, dtype=torch.float16),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A recorded model with speech output in its file."""
    folder = Path(shutil.copytree(GOLDEN / "o2_6", tmp_path / "base", ignore=shutil.ignore_patterns("cases.*")))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | TTS, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by the index, each from the file that it names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert {path.name for path in folder.glob("*.safetensors")} == set(shards)
    assert set().union(*shards.values()) == set(index["weight_map"])
    tensors = {name: shards[file][name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    if "total_parameters" in index["metadata"]:
        assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())
    return tensors


@pytest.mark.parametrize("size", ["1GB", "1MB"])
def test_a_full_result_has_the_speech_output_of_its_base(base: Path, tmp_path: Path, size: str) -> None:
    model = load_model(base, dtype=torch.float32, tokenizer_required=False)
    result = tmp_path / "result"
    model.save_pretrained(str(result), max_shard_size=size)
    finish_full(result, resolve_base(str(base)))
    tensors = stored(result)
    assert len(list(result.glob("*.safetensors"))) > (1 if size == "1GB" else 2)
    for name, expected in TTS.items():
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected)
    assert tensors["llm.lm_head.weight"].dtype == torch.float32
    assert json.loads((result / "config.json").read_text())["torch_dtype"] == "float32"
    for again in (load_model(result, tokenizer_required=False), AutoModel.from_pretrained(result)):
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_a_result_as_base_and_a_sharded_base(base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    model = load_model(base, tokenizer_required=False)
    model.save_pretrained(str(first))
    finish_full(first, resolve_base(str(base)))
    model.save_pretrained(str(second))
    finish_full(second, resolve_base(str(first)))
    assert {name: t.tolist() for name, t in stored(first).items()} == {
        name: t.tolist() for name, t in stored(second).items()
    }


def test_saved_again_into_the_same_folder(base: Path, tmp_path: Path) -> None:
    model = load_model(base, tokenizer_required=False)
    for _ in range(2):
        model.save_pretrained(str(tmp_path / "result"))
        finish_full(tmp_path / "result", resolve_base(str(base)))
    assert len(stored(tmp_path / "result")) == len(model.state_dict()) + len(TTS)


def test_the_bytes_are_those_of_the_file(base: Path, tmp_path: Path) -> None:
    """Also of a kind of number that need not be known here, with the tensors at whole multiples of 8 bytes."""
    model = load_model(base, tokenizer_required=False)
    model.save_pretrained(str(tmp_path / "result"))
    copy_passthrough_tensors(base, tmp_path / "result")
    shard = tmp_path / "result" / "model-00002-of-00002.safetensors"
    assert int.from_bytes(shard.read_bytes()[:8], "little") % 8 == 0
    with safe_open(shard, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(TTS)


def test_without_speech_output_nothing_changes(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "v2_6", tokenizer_required=False)
    model.save_pretrained(str(tmp_path))
    copy_passthrough_tensors(GOLDEN / "v2_6", tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors.index.json").exists()
