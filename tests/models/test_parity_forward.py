"""Parity with recorded results of the official code; deliberate differences are detected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from parity_forward import check_folder
from safetensors.torch import load_file, save_file
from visual_batch import FAMILIES, GOLDEN


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_parity(family: str) -> None:
    results = list(check_folder(GOLDEN / "forward" / family))
    assert len(results) == (4 if family == "v4_5" else 3)
    assert all(result.ok for result in results), "\n".join(map(str, results))


@pytest.mark.parametrize(
    "key", ["llm.model.norm.weight", "vpm.embeddings.position_embedding.weight", "resampler.query"]
)
def test_a_changed_weight_fails(tmp_path: Path, key: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "forward" / "llama3_v2_5", tmp_path / "copy"))
    weights = load_file(folder / "model.safetensors")
    weights[key] = weights[key] * 1.02
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not next(iter(check_folder(folder))).ok


def test_a_wrong_gradient_norm_fails(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "forward" / "v2_0", tmp_path / "copy"))
    cases = json.loads((folder / "cases.json").read_text())
    cases["cases"][0]["grad_norms"]["resampler.kv_proj.weight"] *= 1.002
    (folder / "cases.json").write_text(json.dumps(cases))
    assert [result.ok for result in check_folder(folder)] == [False, True, True]


def test_unsupported_and_incomplete_folders_fail_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minicpmo", "version": 9.9}))
    (result,) = check_folder(tmp_path)
    assert not result.ok
    assert "unknown checkpoint" in result.detail
    shutil.copy(GOLDEN / "forward" / "v2_0" / "config.json", tmp_path)
    (result,) = check_folder(tmp_path)
    assert not result.ok
    assert "cases.json" in result.detail
