"""Shards of WebDataset for tests, and what their samples look like."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.sample import Sample, Text

TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A dog."}]


def picture(width: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 4)).save(file, "png")
    return file.getvalue()


def shard(path: Path, files: Mapping[str, Any], style: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=style) as out:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else None
            data = json.dumps(content).encode() if data is None else data
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return path


def shown(sample: Sample, turn: int = 0) -> str:
    def part_of(part: Any) -> str:
        if isinstance(part, Text):
            return part.text
        return f"[{part.data.width}]" if isinstance(part.data, Image.Image) else f"[{part.data!r}]"

    return "".join(map(part_of, sample.messages[turn].parts))


PNG = picture()
