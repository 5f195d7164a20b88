"""Names and types of all training flags, parsed from source files without importing torch or transformers.

The flags of transformers are declared in its ``training_args.py``, whose import takes seconds (it needs torch). Reading
the class as text gives the same names in milliseconds; a test holds both equal.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

# "str" beside "list[str]", e.g. in "None | str | list[str]".
_STRING = re.compile(r"(?<!\[)\bstr\b")


_OWN = {
    "model.py": ("ModelArguments",),
    "data.py": ("DataArguments",),
    "training.py": ("TrainingArguments", "BatchArguments", "EndingArguments"),
    "preference.py": ("PreferenceArguments",),
}
_OWN_LAST = {"model.py": ("MemoryArguments", "LoraArguments")}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag as its source declares it.

    Attributes:
        name: without dashes.
        annotation: its type, e.g. "float | None".
        declared_in: name of the class.
        default: source text of the default; None for a flag without one.
        help: its help; None where it is not literal text.
        choices: the values that it takes; empty for any.
    """

    name: str
    annotation: str
    declared_in: str
    default: str | None
    help: str | None
    choices: tuple[str, ...]


@cache
def own_flags() -> dict[str, Flag]:
    """The flags of this package by name, those of transformers that it declares again included."""
    here = Path(__file__).parent
    groups = (*_OWN.items(), *_OWN_LAST.items())
    return {flag.name: flag for file, classes in groups for flag in _declared(here / file, classes)}


@cache
def transformers_flags() -> dict[str, Flag]:
    """The flags of ``transformers.TrainingArguments`` by name, as the installed version declares them."""
    return {flag.name: flag for flag in _declared(_transformers_file(), ("TrainingArguments",))}


@cache
def flag_types() -> dict[str, str]:
    """Annotation of every flag of training by its name, as the dataclasses have it ("int", "float | None", ...)."""
    return {name: flag.annotation for name, flag in {**transformers_flags(), **own_flags()}.items()}


def takes_many() -> dict[str, bool]:
    """Whether a flag takes several values, by its name; one that takes a string too takes them separated by commas."""
    return {name: "list" in kind and not _STRING.search(kind) for name, kind in flag_types().items()}


def _transformers_file() -> Path:
    """The file of ``transformers.TrainingArguments`` in the installed package, found without importing it."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed")
    return Path(spec.origin).with_name("training_args.py")


def _declared(path: Path, classes: Sequence[str]) -> Iterator[Flag]:
    """Fields of dataclasses in a source file, class by class."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    aliases = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in tree.body if _is_literal_type(node)}
    for name in classes:
        yield from _fields(found[name], name, aliases)


def _is_literal_type(node: ast.stmt) -> TypeGuard[ast.Assign]:
    """Whether a statement names a ``Literal[...]``."""
    return isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("Literal[")


def _fields(body: Sequence[ast.stmt], owner: str, aliases: Mapping[str, str]) -> Iterator[Flag]:
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = ast.unparse(node.annotation)
        given = {}
        if isinstance(node.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
        if ("init" in given and ast.unparse(given["init"]) == "False") or annotation.startswith("ClassVar"):
            continue
        about = given.get("metadata")
        entries = dict(zip(about.keys, about.values, strict=True)) if isinstance(about, ast.Dict) else {}
        texts = {_literal(key): _literal(value) for key, value in entries.items()}
        choices = texts.get("choices") or re.findall(r"'([^']*)'", aliases.get(annotation, annotation))
        default = ast.unparse(given["default"]) if "default" in given else None
        yield Flag(node.target.id, annotation, owner, default, texts.get("help"), tuple(choices))


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal; None for anything that has to be computed."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
