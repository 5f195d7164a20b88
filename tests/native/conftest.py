"""Tiny folders of 4.6, 4.7 and OCR with weights that the class of transformers has drawn and saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from finetune.families import FAMILIES, by_name
from finetune.families.settings import DOWNSAMPLE_MODE
from finetune.model_folders.downsample_mode import write_mode
from finetune.tiny.native_folders import write_native

Native = Callable[..., Path]


@pytest.fixture(params=[family.name for family in FAMILIES if family.network is None])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """Path of a tiny folder by family name and downsample mode, its own by default; callers must not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, mode: str | None = None) -> Path:
        key = family, mode or str(by_name(family).settings[DOWNSAMPLE_MODE].default)
        if key not in made:
            made[key] = _write(*key, tmp_path_factory.mktemp("native") / "-".join(key))
        return made[key]

    return make


def _write(family: str, mode: str, folder: Path) -> Path:
    folder.mkdir()
    write_native(by_name(family), folder)
    write_mode(folder, by_name(family), mode)
    path = folder / "config.json"
    as_written = path.read_bytes()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.save_pretrained(folder)
    path.write_bytes(as_written)
    return folder
