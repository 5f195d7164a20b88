"""Who may import whom (the table of the house), held by reading every import statement of the package."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import design_doc
from tools.layers import EXCEPTIONS, TABLE, TORCH, WITHOUT

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "finetune"
ROOT_SCRIPTS = {"dataset", "trainer", "chat"}


def modules() -> dict[str, Path]:
    """Every module of the package without the leading ``finetune.``; a package is its ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below ``node``, also inside functions; not what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from statements(child)


def imported(source: str) -> set[str]:
    """Dotted names of everything that ``source`` imports; ``from a import b`` counts as ``a.b``."""
    names: set[str] = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(module: str) -> str:
    return next((room for room in TABLE if within(module, room)), "nowhere")


def violations(module: str, source: str) -> list[str]:
    """What ``module`` imports against the table."""
    found = []
    room = room_of(module)
    banned = {package for where, packages in WITHOUT.items() if within(module, where) for package in packages}
    for name in sorted(imported(source)):
        top, _, rest = name.partition(".")
        if top in ROOT_SCRIPTS:
            found.append(f"{module} imports the root script {top}")
        elif top in banned:
            found.append(f"{module} imports {top}")
        elif (module, name) in EXCEPTIONS:
            continue
        elif top == "finetune" and rest and rest != "__version__":
            allowed = TABLE[room] | {room.partition(".")[0] if room != "media.slicing" else room}
            if not any(within(rest, other) for other in allowed):
                found.append(f"{module} imports finetune.{rest}; {room} may import {sorted(TABLE[room])}")
    return found


def branches_on_family(source: str) -> list[str]:
    """Comparisons that ask which family it is, instead of asking the family."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            operands = [node.subject]
        else:
            continue
        if any(ast.unparse(operand).endswith("family.name") for operand in operands):
            found.append(ast.unparse(node).splitlines()[0])
    return found


def test_every_module_has_a_room() -> None:
    assert len(modules()) > 20
    assert [module for module in modules() if room_of(module) == "nowhere"] == []


@pytest.mark.parametrize("module", modules())
def test_imports(module: str) -> None:
    assert violations(module, modules()[module].read_text(encoding="utf-8")) == []


def test_exceptions_are_late_and_still_needed() -> None:
    for module, name in EXCEPTIONS:
        source = modules()[module].read_text(encoding="utf-8")
        assert name in imported(source)
        assert f"\nfrom {name.rpartition('.')[0]}" not in source


def test_no_circle() -> None:
    """Every package imports only packages that stand above it in the table, so there is no circle."""
    seen: set[str] = set()
    for room, others in TABLE.items():
        package = room.partition(".")[0]
        assert {other.partition(".")[0] for other in others} <= seen | {package}, room
        seen.add(package)


def test_table_has_no_idle_entry() -> None:
    """What a package may import, some module of it does import."""
    used: dict[str, set[str]] = {room: set() for room in TABLE}
    for module, path in modules().items():
        room = room_of(module)
        for name in imported(path.read_text(encoding="utf-8")):
            used[room] |= {other for other in TABLE[room] if within(name.removeprefix("finetune."), other)}
    assert {room: others - used[room] for room, others in TABLE.items() if others - used[room]} == {}


def public_classes() -> Iterator[tuple[str, str]]:
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, module


def test_one_name_one_thing() -> None:
    """No two modules and no two public classes of one name; a command's file is named as the command."""
    leaves = Counter(module.rpartition(".")[2] for module in modules() if not module.startswith("commands."))
    leaves.subtract({module: 1 for module in modules() if "." not in module and (PACKAGE / module).is_dir()})
    assert {name: count for name, count in leaves.items() if count > 1} == {}
    classes = Counter(name for name, _ in public_classes())
    assert {name: count for name, count in classes.items() if count > 1} == {}


def test_the_picture_is_that_of_the_table() -> None:
    page = design_doc.PAGE.read_text(encoding="utf-8")
    assert design_doc.written(page) == page, "run: python -m tools.design_doc"


def test_every_package_and_file_of_the_page_exists() -> None:
    """docs/design.md names all packages, and no file that is not there."""
    page = design_doc.PAGE.read_text(encoding="utf-8")
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert {name for name in packages if f"`finetune/{name}/`" not in page} == set()
    named = set(re.findall(r"[\w/]+\.py\b", page))
    missing = {
        name for name in named if not any((folder / name).is_file() for folder in (ROOT, PACKAGE, ROOT / "tests"))
    }
    assert missing == set()


def test_media_and_slicing_are_not_confused() -> None:
    assert (room_of("media.slicing"), room_of("media.image"), room_of("media")) == ("media.slicing", "media", "media")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.vision", "from finetune.templates.prompt_types import TokenizedPrompt"),
        ("models.vision", "from finetune.readers import read"),
        ("models.vision", "def f():\n    import finetune.encoding.encoder"),
        ("models.vision", "from finetune import encoding"),
        ("models.chat_mixin", "from finetune.chat.pipeline import ChatPipeline"),
        ("models.vision", "from finetune.chat.model_chat import chat"),
        ("evaluation.plots", "from finetune.chat.pipeline import ChatPipeline"),
        ("encoding.encoder", "from finetune.models import load_model"),
        ("templates.llama3", "from finetune.models.visual_items import x"),
        ("templates.llama3", "from finetune.families import detect"),
        ("readers.official", "from finetune.models import load_model"),
        ("readers.official", "from finetune.families import detect"),
        ("sample", "def f():\n    import torch"),
        ("arguments", "from torch import nn"),
        ("families.family", "import torch.nn as nn"),
        ("families.v2_0", "import transformers"),
        ("media.slicing", "from PIL import Image"),
        ("media.slicing", "from finetune.media.image import x"),
        ("training.freezing", "from trainer import CPMTrainer"),
        ("training.freezing", "import dataset"),
        ("training.freezing", "from finetune.readers import read"),
        ("training.freezing", "from finetune.commands import tiny"),
        ("evaluation.plots", "from finetune.training import freezing"),
    ],
)
def test_the_check_sees(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "models.vision",
            "from finetune.families.family import Family\nfrom finetune.models.visual_items import x\nimport torch",
        ),
        ("sample", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("commands.demo", "import finetune\nfrom finetune.training.freezing import x\nimport peft"),
        ("checkpoints.saving", "from finetune import __version__"),
        ("families.v2_0", "from finetune.families.family import Family"),
    ],
)
def test_the_check_allows(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_nothing_asks_for_the_name_of_a_family() -> None:
    inside = [path for module, path in modules().items() if not within(module, "families")]
    found = {path: branches_on_family(path.read_text(encoding="utf-8")) for path in [*inside, *ROOT.glob("*.py")]}
    assert {name: branches for name, branches in found.items() if branches} == {}


@pytest.mark.parametrize(
    "source",
    [
        "if family.name == 'v2_0': pass",
        "x = 1 if 'v2_0' != model.config.family.name else 2",
        "y = self.family.name in ('v2_0',)",
        "match family.name:\n    case 'v2_0': pass",
    ],
)
def test_the_family_check_sees(source: str) -> None:
    assert branches_on_family(source)


def test_no_root_file_shadows_a_package() -> None:
    """A root file called like an installed package would be imported in its place."""
    taken = TORCH | {"transformers", "datasets", "evaluate", "tokenizers", "safetensors", "numpy", "yaml", "matplotlib"}
    assert not taken & {path.stem for path in ROOT.glob("*.py")}


def test_files_fit_a_sitting() -> None:
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]
    long = {str(path): lines for path in files if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}
