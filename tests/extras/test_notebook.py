"""examples/quickstart.ipynb, run from the first cell to the last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]


def test_the_quick_start_runs_and_shows_its_result(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the file is kept without outputs"
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    output = {index: _text(cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    said = "".join(output.values())
    assert "verified=True" in said
    scores = re.search(r"normalised +([01]\.\d{4}) +base ([01]\.\d{4})", said)
    assert scores, said[-3000:]
    assert float(scores[1]) > float(scores[2]) + 0.5, "the adapter learned nothing"
    assert any("image/png" in item.get("data", {}) for cell in notebook.cells for item in cell.get("outputs", ()))
    assert re.search(r"\?\s+[a-z]+\s*$", output[max(output)]), "the last cell asks and answers"
    assert (tmp_path / "output" / "quickstart" / "adapter" / "adapter_model.safetensors").is_file()


def _text(cell: Any) -> str:
    return "".join(item.get("text", "") or item.get("data", {}).get("text/plain", "") for item in cell.outputs)
