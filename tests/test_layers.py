"""Who may import whom (the table of the house), held by reading every import statement of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "finetune"
ROOT_SCRIPTS = {"dataset", "trainer", "chat"}

# Room -> rooms it may import, besides itself. The first entry that fits a module counts.
MODELS_OR_DATA = {"errors", "paths", "quoting", "filetypes", "jsonfiles", "activations", "outcome", "processes"}
MODELS_OR_DATA |= {"sample", "arguments", "batching", "distributed"}
MODELS_OR_DATA |= {"media", "families", "templates", "encoding", "models"}
TABLE: dict[str, set[str]] = {
    "__init__": set(),
    "quoting": set(),
    "filetypes": set(),
    "errors": {"quoting"},
    "cache": {"paths"},
    "notices": set(),
    "sample": {"errors", "quoting"},
    "legacy_flags": set(),
    "activations": {"errors"},
    "batching": {"errors"},
    "jsonfiles": {"errors"},
    "zero": {"errors"},
    "paths": {"errors"},
    "checks": {"errors", "flags", "data_flags", "jsonfiles"},
    "flags": {"errors"},
    "data_flags": {"errors", "media.sampling"},
    "config": {"errors", "jsonfiles", "legacy_flags"},
    "processes": set(),
    "signals": set(),
    "ending": {"errors"},
    "outcome": {"errors", "processes", "signals"},
    "launch": {"outcome", "processes"},
    # distributed only inside a function: DeepSpeed's start on CPU
    "arguments": {
        "errors",
        "activations",
        "batching",
        "checks",
        "ending",
        "flags",
        "data_flags",
        "config",
        "distributed",
        "zero",
    },
    "distributed": {"errors", "arguments"},
    "media.slicing": set(),
    "media.sound": set(),
    "media.sampling": {"errors"},
    "media": {"errors", "notices", "quoting", "filetypes", "sample", "processes"},
    "families.base": {"errors", "sample", "media.slicing", "media.sound", "media.sampling", "templates.rendering"},
    "families": {"errors", "sample", "media.slicing", "media.sound", "media.sampling", "templates"},
    "templates": {
        "errors",
        "notices",
        "quoting",
        "sample",
        "media.slicing",
        "media.sound",
        "media.sampling",
        "families.base",
    },
    "readers": {"errors", "cache", "jsonfiles", "quoting", "filetypes", "sample", "media.pictures"},
    "encoding": {"errors", "cache", "notices", "quoting", "sample", "media", "templates", "families"},
    "models": {"errors", "jsonfiles", "paths", "families", "notices"},
    "tuning": MODELS_OR_DATA,
    # how pages look, whatever they show
    "pages.page": {"errors", "quoting"},
    "pages.pictures": set(),
    "pages.charts": set(),
    "pages": {"errors", "quoting", "sample", "media", "templates", "families", "encoding"},
    "evaluation": MODELS_OR_DATA | {"pages.page", "pages.pictures", "pages.charts"},
    # only the rules of boxes and words
    "guicourse": {"errors", "quoting", "sample", "media.pictures", "evaluation.metrics"},
    "chat": MODELS_OR_DATA | {"tuning", "evaluation"},
    "export": MODELS_OR_DATA | {"tuning"},
    # the one plan that is made for a run with its records
    "planning.fit": MODELS_OR_DATA | {"tuning", "planning"},
    "planning": {"errors", "activations", "arguments", "families", "models", "tuning"},
    "commands": MODELS_OR_DATA
    | {
        "config",
        "flags",
        "data_flags",
        "legacy_flags",
        "readers",
        "tuning",
        "evaluation",
        "chat",
        "export",
        "planning",
        "guicourse",
        "pages",
    },
    "__main__": {"errors", "outcome", "processes", "commands"},
}

# What stands against the table, inside a function, with its reason.
EXCEPTIONS = {
    # ``model.chat`` is a method of the networks, and what writes prompts stands above them.
    ("models.chatting", "finetune.chat.method.chat"),
}

# Modules that never import these packages, not even inside a function.
TORCH = {"torch", "torchvision", "timm", "deepspeed", "accelerate", "peft"}
WITHOUT: dict[str, set[str]] = {
    "__init__": TORCH | {"transformers"},
    "cache": TORCH | {"transformers"},
    "notices": TORCH | {"transformers"},
    "quoting": TORCH | {"transformers"},
    "filetypes": TORCH | {"transformers"},
    "__main__": TORCH | {"transformers"},
    "errors": TORCH | {"transformers"},
    "legacy_flags": TORCH | {"transformers"},
    "flags": TORCH | {"transformers"},
    "data_flags": TORCH | {"transformers"},
    "batching": TORCH | {"transformers"},
    "jsonfiles": TORCH | {"transformers"},
    "paths": TORCH | {"transformers"},
    "checks": TORCH,
    "config": TORCH | {"transformers"},
    "outcome": TORCH | {"transformers"},
    "processes": TORCH | {"transformers"},
    "signals": TORCH | {"transformers"},
    "ending": TORCH | {"transformers"},
    "sample": TORCH | {"transformers"},
    "arguments": TORCH,
    "families": TORCH | {"transformers"},
    "templates": TORCH,
    "readers": TORCH | {"transformers"},
    "guicourse": TORCH | {"transformers"},
    "media.sound": TORCH | {"transformers", "numpy", "PIL"},
    "media.sampling": TORCH | {"transformers", "numpy", "PIL"},
    "media.video": TORCH | {"transformers"},
    "media.slicing": TORCH | {"transformers", "numpy", "PIL"},
    "encoding": TORCH - {"torch"},
    "models": {"deepspeed", "accelerate", "PIL"},
}


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


def test_media_and_slicing_are_not_confused() -> None:
    assert (room_of("media.slicing"), room_of("media.image"), room_of("media")) == ("media.slicing", "media", "media")
    assert (room_of("families.base"), room_of("families.v2_0")) == ("families.base", "families")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.vision", "from finetune.templates.rendering import Rendered"),
        ("models.vision", "from finetune.readers import read"),
        ("models.vision", "def f():\n    import finetune.encoding.encoder"),
        ("models.vision", "from finetune import encoding"),
        ("models.chatting", "from finetune.chat.talker import Talker"),
        ("models.vision", "from finetune.chat.method import chat"),
        ("evaluation.plots", "from finetune.chat.talker import Talker"),
        ("encoding.encoder", "from finetune.models import load_model"),
        ("templates.llama3", "from finetune.models.items import x"),
        ("templates.llama3", "from finetune.families import detect"),
        ("readers.official", "from finetune.models import load_model"),
        ("readers.official", "from finetune.families import detect"),
        ("sample", "def f():\n    import torch"),
        ("arguments", "from torch import nn"),
        ("families.base", "import torch.nn as nn"),
        ("families.v2_0", "import transformers"),
        ("media.slicing", "from PIL import Image"),
        ("media.slicing", "from finetune.media.image import x"),
        ("tuning.parts", "from trainer import CPMTrainer"),
        ("tuning.parts", "import dataset"),
        ("tuning.parts", "from finetune.readers import read"),
        ("tuning.parts", "from finetune.commands import tiny"),
        ("evaluation.plots", "from finetune.tuning import parts"),
    ],
)
def test_the_check_sees(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "models.vision",
            "from finetune.families.base import Family\nfrom finetune.models.items import x\nimport torch",
        ),
        ("sample", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("commands.demo", "import finetune\nfrom finetune.tuning.parts import x\nimport peft"),
        ("tuning.saving", "from finetune import __version__"),
        ("families.v2_0", "from finetune.families.base import Family"),
    ],
)
def test_the_check_allows(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_nothing_asks_for_the_name_of_a_family() -> None:
    inside = [path for module, path in modules().items() if not within(module, "families")]
    found = {path.name: branches_on_family(path.read_text(encoding="utf-8")) for path in [*inside, *ROOT.glob("*.py")]}
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
    long = {path.name: lines for path in files if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}
