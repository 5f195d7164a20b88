"""Generates the package diagram of docs/design.md from the table of layers: ``python -m tools.design_doc``."""

from __future__ import annotations

from pathlib import Path

from tools.layers import EXCEPTIONS, TABLE

PAGE = Path(__file__).parents[1] / "docs" / "design.md"
START, END = "<!-- packages: written by python -m tools.design_doc -->\n", "<!-- packages: end -->\n"
# Imported nearly everywhere: arrows to them would hide the others.
_EVERYWHERE = {"utils", "sample"}


def package_graph() -> dict[str, set[str]]:
    """Packages and single modules of ``finetune`` with what they may import, without what they reach anyway."""
    direct: dict[str, set[str]] = {}
    for room, others in TABLE.items():
        package = room.partition(".")[0]
        targets = {other.partition(".")[0] for other in others} - {package} - _EVERYWHERE
        direct.setdefault(package, set()).update(targets)
    return {
        package: {one for one in targets if not _reached(direct, targets, one)} for package, targets in direct.items()
    }


def _reached(direct: dict[str, set[str]], others: set[str], wanted: str) -> bool:
    """Whether a package is reached through another of some packages."""
    waiting, seen = [other for other in others if other != wanted], set[str]()
    while waiting:
        for target in direct[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return wanted in seen


def picture() -> str:
    """The graph as Mermaid: solid arrows as in the table, a dotted one for each exception."""
    lines = ["```mermaid", "flowchart TB"]
    for package, targets in reversed(package_graph().items()):
        if targets and not package.startswith("__"):
            lines.append(f"  {package} --> {' & '.join(sorted(targets))}")
    for module, name in sorted(EXCEPTIONS):
        lines.append(f"  {module.partition('.')[0]} -.->|model.chat| {name.split('.')[1]}")
    return "\n".join([*lines, "```", ""])


def written(page: str) -> str:
    """The page with the diagram between its markers."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{picture()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
