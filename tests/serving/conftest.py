"""A network of each family with an adapter and the merged model, made once; the pictures; the table of results."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pytest
import served_rows
from made_adapters import make_adapter, save
from PIL import Image
from runs import command


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> Callable[[str], Path]:
    @cache
    def made(family: str) -> Path:
        source = networks.published(family)
        if source is None:
            pytest.skip(f"left out: VENDOR_CODE names no folder with the files of {family}")
        return networks.write_network(family, source, tmp_path_factory.mktemp(family) / family)

    return made


@pytest.fixture(scope="session")
def adapter(network, tmp_path_factory) -> Callable[[str], Path]:
    """LoRA on every part and a resampler trained in full."""

    @cache
    def made(family: str) -> Path:
        model = make_adapter(network(family), family, r=4, modules_to_save=networks.adapter_parts(family))
        return save(model, tmp_path_factory.mktemp("adapter") / family)

    return made


@pytest.fixture(scope="session")
def merged(adapter, tmp_path_factory) -> Callable[[str], Path]:
    @cache
    def made(family: str) -> Path:
        out = tmp_path_factory.mktemp("merged") / family
        command("export", "--adapter_name_or_path", adapter(family), "--export_dir", out)
        return out

    return made


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A square, slices, two pictures in one turn, two turns, and no picture; sizes that llama.cpp does not stretch."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, (width, height) in {"a": (448, 448), "b": (900, 700), "c": (448, 448)}.items():
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], -1) + random.normal(0, 20, (*x.shape, 3))
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"{name}.png")
    one = ["<image>\nWhat is this?", "A picture."]
    records = [
        {"id": "square", "image": "a.png", "conversations": turns(*one)},
        {"id": "slices", "image": "b.png", "conversations": turns("<image>\nName the colours in it.", "Red.")},
        {
            "id": "two",
            "image": {"<image_00>": "a.png", "<image_01>": "c.png"},
            "conversations": turns("First <image_00> then <image_01>\nWhich is brighter?", "The second."),
        },
        {"id": "turns", "image": "a.png", "conversations": turns(*one, "And where was it taken?", "Outside.")},
        {"id": "text", "conversations": turns("Say something.", "No.")},
    ]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


@pytest.fixture
def compare(data: Path, tmp_path: Path) -> Callable[..., served_rows.Row]:
    """Compares a server with a model here by ``evaluate --url --compare``, and writes a row of the table."""

    def measured(url: str, model: Path, cell: served_rows.Cell, dtype: str) -> served_rows.Row:
        out = tmp_path / f"compared with {cell.engine}"
        words = ["--compare", model, "--data", data, "--max_new_tokens", 12, "--dtype", dtype, "--device", "cpu"]
        # Beside an adapter vLLM names its base too.
        words += ["--served_model", "tuned"] if cell.engine == "vllm" else []
        print(command("evaluate", "--url", url, *words, "--out", out))
        lines = (out / "comparison.jsonl").read_text(encoding="utf-8").splitlines()
        row = served_rows.row_of(cell, dtype, [json.loads(line) for line in lines])
        served_rows.write(row)
        return row

    return measured
