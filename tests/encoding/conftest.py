"""Data files over images of every troublesome kind, and an encoder over the small recorded tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_tokenizers import tokenizer
from zoo import write_zoo

from finetune.encoding.encoder import Encoder
from finetune.families import by_name
from finetune.media.slicing import SliceSpec
from finetune.templates.rendering import Layout


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of image files; callers must not write into it."""
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def write_records(zoo: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a data file with one record per image name (None for text only), or with given records."""

    def write(*images: Any, name: str = "data.json", **changes: Any) -> Path:
        records = []
        for number, image in enumerate(images):
            if isinstance(image, (str, type(None))):
                turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
                image = {"id": str(number), "conversations": turns, **({"image": str(zoo / image)} if image else {})}
            records.append({**image, **changes} if isinstance(image, dict) else image)
        (tmp_path / name).write_text(json.dumps(records))
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., Encoder]:
    """An encoder of Llama3-V 2.5 with 4 placeholders per item; its vocabulary is shared."""
    first = Encoder(
        by_name("llama3_v2_5"),
        tokenizer("llama3"),
        layout=Layout(query_num=4),
        slicing=SliceSpec(9, 56, 14),
        max_length=None,
    )

    def make(max_length: int | None = None) -> Encoder:
        made = object.__new__(Encoder)
        made.__dict__.update(first.__dict__, max_length=max_length)
        return made

    return make
