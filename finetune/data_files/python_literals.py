"""Converts files with Python literals (single quotes, trailing commas, None) to JSON: ``check --write_json``."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.data_files.json_errors import unreadable
from finetune.sample import DataError
from finetune.utils.quoting import reason, shown

MOST_BYTES = 64 << 20
"""Largest file that is converted: Python's parser takes some hundred times the memory of its text."""

_NAMES = {"true": True, "false": False, "null": None}


class _Names(ast.NodeTransformer):
    """Accepts true, false and null among Python literals."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(_NAMES[node.id]), node) if node.id in _NAMES else node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        keys = Counter(key.value for key in node.keys if isinstance(key, ast.Constant))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise ValueError(f"line {node.lineno}: duplicate key {shown(twice[0])}")
        return self.generic_visit(node)


def write_json(source: Path, target: Path) -> int:
    """Converts a file with Python literals (or JSON) to JSON; no code in it is executed.

    Args:
        source: a list of records, may have single quotes, trailing commas, # comments, None, True and False.
        target: a file that does not exist yet.

    Returns:
        The number of records.

    Raises:
        DataError: the source is neither, or the target exists.
    """
    records = _records(source)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write("[\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]\n")
    except FileExistsError as error:
        raise DataError(f"{target} exists and is not overwritten; give another name") from error
    except OSError as error:
        raise DataError(f"{target} cannot be written ({reason(error)})") from error
    return len(records)


def _records(path: Path) -> list[Any]:
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise DataError(f"{path}: {size} bytes are more than the {MOST_BYTES} that are converted; split the file")
        text = path.read_text(encoding="utf-8-sig")
        value = ast.literal_eval(_Names().visit(ast.parse(text.strip(), str(path), mode="eval")))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except SyntaxError as error:
        raise DataError(f"{path}, line {error.lineno}: neither JSON nor a Python list: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: neither JSON nor a Python list of records: {error}") from error
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{path}: contains {type(value).__name__}, expected a list of records; put [ ] around it")
    return list(value)
