"""Names and types of all flags of training, read from source files: nothing heavy is imported for them.

The flags of transformers are declared in its ``training_args.py``, whose import takes seconds (it needs torch). Reading
the class as text gives the same names in milliseconds; a test holds both equal.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

from finetune.arguments.data import DataArguments
from finetune.arguments.model import LoraArguments, ModelArguments

# "str" beside "list[str]", e.g. in "None | str | list[str]".
_STRING = re.compile(r"(?<!\[)\bstr\b")


@cache
def flag_types() -> dict[str, str]:
    """Annotation of every flag of training by its name, as the dataclasses have it ("int", "float | None", ...)."""
    own = [entry for group in (ModelArguments, DataArguments, LoraArguments) for entry in fields(group)]
    found = {entry.name: str(entry.type) for entry in own}
    found |= _declared(_transformers_file(), ["TrainingArguments"])
    classes = ["BatchArguments", "EndingArguments", "TrainingArguments"]
    found |= _declared(Path(__file__).with_name("training.py"), classes)
    return found | _declared(Path(__file__).with_name("model.py"), ["MemoryArguments"])


def takes_many() -> dict[str, bool]:
    """Whether a flag takes several values, by its name; one that takes a string too takes them separated by commas."""
    return {name: "list" in kind and not _STRING.search(kind) for name, kind in flag_types().items()}


def _transformers_file() -> Path:
    """The file of ``transformers.TrainingArguments`` in the installed package, found without importing it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed")
    return Path(spec.origin).with_name("training_args.py")


def _declared(path: Path, classes: Sequence[str]) -> dict[str, str]:
    """Fields of dataclasses in a source file, with their annotations."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
    return dict(entry for body in bodies for entry in _fields(body))


def _fields(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = ast.unparse(node.annotation)
        made = isinstance(node.value, ast.Call) and any(
            keyword.arg == "init" and ast.unparse(keyword.value) == "False" for keyword in node.value.keywords
        )
        if not made and not annotation.startswith("ClassVar"):
            yield node.target.id, annotation
