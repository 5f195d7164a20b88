"""The documentation: README_zh.md mirrors README.md, messages and names on the pages are those of the code."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import serving_doc

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
# Messages on docs/troubleshooting.md that other libraries print.
FOREIGN = ("torch.OutOfMemoryError", "The checkpoint you are trying to load")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def headings(path: Path) -> list[str]:
    """The levels of the headings outside of code blocks, with the text."""
    return re.findall(r"^(#+ .*)$", re.sub(r"^```.*?^```$", "", text(path), flags=re.M | re.S), flags=re.M)


def code(path: Path) -> list[str]:
    """The code blocks, fenced and indented, without comments of shell lines; and what stands between backticks."""
    blocks = re.findall(r"^```\w*\n.*?^```$", text(path), flags=re.M | re.S)
    indented = re.findall(r"^    .*$", re.sub(r"^```.*?^```$", "", text(path), flags=re.M | re.S), flags=re.M)
    return [*(re.sub(r" +# .*$", "", block, flags=re.M) for block in blocks), *indented]


def test_the_chinese_readme_has_the_same_sections_and_code() -> None:
    english, chinese = ROOT / "README.md", ROOT / "README_zh.md"
    assert [line.split()[0] for line in headings(chinese)] == [line.split()[0] for line in headings(english)]
    assert code(chinese) == code(english)
    for pattern in (r"\]\(((?:docs/)?\w+\.md)\)", r"`((?:openbmb/|--|sh |make )[^`]*)`", r"^\| *(MiniCPM-\S+ [\d.]+ )"):
        found = {path: re.findall(pattern, text(path), flags=re.M) for path in (english, chinese)}
        found = {path: [name for name in names if "README" not in name] for path, names in found.items()}
        assert found[chinese] == found[english]


def test_the_readme_is_one_screen_to_a_first_result() -> None:
    assert len(text(ROOT / "README.md").splitlines()) < 150


def test_labels_of_arrows_stand_between_bars() -> None:
    """Mermaid ends the text of ``A -. text .-> B`` at its first dot, and then shows an error instead of the diagram."""
    diagrams = [
        block for page in PAGES for block in re.findall(r"^```mermaid\n.*?^```$", text(page), flags=re.M | re.S)
    ]
    assert diagrams
    assert not [line for block in diagrams for line in block.splitlines() if re.search(r"-\. |-- ", line)]


def test_every_page_is_in_the_navigation_and_in_the_overview() -> None:
    named = set(re.findall(r": (\w+\.md)$", text(ROOT / "mkdocs.yml"), flags=re.M))
    pages = {path.name for path in DOCS.glob("*.md")}
    assert named == pages
    assert set(re.findall(r"\((\w+\.md)\)", text(DOCS / "index.md"))) == pages - {"index.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page: Path) -> None:
    """Anchors are checked by ``make docs``."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"`[^`]*`", "", text(page))):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


def test_extras_are_those_of_pyproject() -> None:
    extras = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    named = {name for page in PAGES for name in re.findall(r"'\.\[([\w-]+)\]'", text(page))}
    assert named <= extras.keys()


# ---- docs/troubleshooting.md ----


def sources() -> Iterator[Path]:
    yield from (ROOT / "finetune").rglob("*.py")
    yield from (ROOT / name for name in ("finetune.py", "dataset.py", "trainer.py", "preference_trainer.py"))


def template(node: ast.expr) -> str:
    """A string expression with ``\\0`` for what is filled in."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%(?:\(\w+\))?[-+.\d]*[a-z]", "\0", node.value) if isinstance(node.value, str) else "\0"
    if isinstance(node, ast.JoinedStr):
        return "".join(str(value.value) if isinstance(value, ast.Constant) else "\0" for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "\0"


def messages() -> list[str]:
    found = [
        template(node)
        for path in sources()
        for node in ast.walk(ast.parse(text(path)))
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)
    ]
    launcher = re.findall(r'problem "([^"]*)"', text(ROOT / "finetune_lora.sh"))
    return [*found, *(re.sub(r"\$[\w/{}]+", "\0", line) for line in launcher)]


def printed_messages() -> list[str]:
    return re.findall(r"^### `(.*)`$", text(DOCS / "troubleshooting.md"), flags=re.M)


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """Each, with anything for "...", is the beginning or a part of one message of the code."""
    known = messages()
    asked = [message for message in printed_messages() if not message.startswith(FOREIGN)]
    assert len(asked) > 40
    missing = []
    for message in asked:
        parts = [re.escape(part) for part in message.split("...")]
        if not any(re.search(".*".join(parts), one, flags=re.S) for one in known):
            missing.append(message)
    assert missing == [], "reword these headings of docs/troubleshooting.md as the code has them"


# ---- docs/export.md ----


def test_the_table_of_served_models_is_the_one_that_was_measured() -> None:
    page = text(serving_doc.PAGE)
    assert serving_doc.written(page) == page, "run: python -m tools.serving_doc"
    assert page.count("| vllm |") >= 1
    assert page.count("| llama.cpp |") >= 1


# ---- docs/add_a_generation.md ----


def test_the_names_of_add_a_generation_are_those_of_the_code() -> None:
    page = text(DOCS / "add_a_generation.md")
    everything = "\n".join([*map(text, sources()), *map(text, (ROOT / "tests").rglob("*.py"))])
    folders = ("", "finetune", "finetune/families", "finetune/templates", "finetune/tiny")
    for name in re.findall(r"`([\w./]+)`", page):
        if "/" in name or name.endswith((".py", ".md", ".json")):
            assert any((ROOT / folder / name).exists() for folder in folders), name
        else:
            for part in name.split("."):
                assert re.search(rf"\b{part}\b", everything), name


def test_the_values_of_add_a_generation_are_those_of_the_family() -> None:
    block = re.search(r"```python\n(.*?)```", text(DOCS / "add_a_generation.md"), flags=re.S)
    assert block
    family = text(ROOT / "finetune" / "families" / "v4_7.py")
    for line in block[1].splitlines():
        shown = re.sub(r" +# .*$", "", line)
        assert shown.strip() == "..." or shown in family.splitlines(), line
