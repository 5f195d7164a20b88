"""Writes one setting into the JSON files of a model folder; everything else in them stays as it is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any


def write_setting(folder: Path, name: str, value: str | bool, parts: Mapping[str, Set[str]], default: Any) -> None:
    """Sets a value in the files of a folder, as far as it has them; a file that has it already is not written.

    Args:
        folder: the folder.
        name: key of the setting.
        value: its value.
        parts: file to its sections that hold the key ("" is the top level).
        default: what a section without the key means; no key is added for it.
    """
    for file, sections in parts.items():
        if (path := folder / file).is_file():
            before = path.read_bytes()
            if (after := _changed(before.decode(), name, value, sections, default).encode()) != before:
                path.write_bytes(after)


def _changed(text: str, name: str, value: str | bool, sections: Set[str], default: Any) -> str:
    """The text of a JSON file with another value in some sections, otherwise byte for byte."""
    values: dict[str, Any] = json.loads(text)
    wanted = copy.deepcopy(values)
    for part in (wanted.get(section) if section else wanted for section in sections):
        if isinstance(part, dict) and part.get(name, default) != value:
            part[name] = value
    if wanted == values:
        return text
    edited = re.sub(rf'("{name}"\s*:\s*)("[^"\\]*"|true|false)', rf"\g<1>{json.dumps(value)}", text)
    # If the key is missing, or is in other sections too, the file is serialised again.
    return edited if json.loads(edited) == wanted else json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
