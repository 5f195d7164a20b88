"""Generates the tables of docs/settings.md from the code: ``python tools/settings_doc.py``."""

from __future__ import annotations

from pathlib import Path

from finetune.families import FAMILIES
from finetune.families.settings import ConfigKey, Setting, Table

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
_NAMES = {
    "image_processor": "image processor",
    "video_processor": "video processor",
    "audio_processor": "audio processor",
    "config.json": "config.json",
}
START, END = "<!-- tables: written by tools/settings_doc.py -->\n", "<!-- tables: end -->\n"


def tables() -> str:
    """One table per group of families that read alike."""
    groups: list[tuple[list[str], Table]] = []
    for family in FAMILIES:
        same = next((titles for titles, table in groups if table == family.settings), None)
        if same is None:
            groups.append(([family.title], family.settings))
        else:
            same.append(family.title)
    return "\n".join(f"### {', '.join(titles)}\n\n{_table(table)}" for titles, table in groups)


def _table(table: Table) -> str:
    rows = [
        "| setting | first read from | then | where no file tells | where files disagree | published rule |",
        "|---|---|---|---|---|---|",
    ]
    for name, setting in table.items():
        places = [_place(place) for place in setting.places] or ["no file"]
        then = ", ".join(places[1:])
        rows.append(
            f"| `{name}` | {places[0]} | {then} | {_default(setting)} | {_verdict(setting)} | {setting.source} |"
        )
    return "\n".join(rows) + "\n"


def _place(place: ConfigKey) -> str:
    default = "" if place.default is None else f" (else {_shown(place.default)})"
    return f"{_NAMES[place.file]} `{place.key}`{default}"


def _default(setting: Setting) -> str:
    return "" if setting.default is None else _shown(setting.default)


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _verdict(setting: Setting) -> str:
    if setting.only is not None:
        return f"refused unless {_shown(setting.only)}"
    if len(setting.places) < 2:
        return ""
    return "refused" if setting.agree else "the first, and the log says so"


def written(page: str) -> str:
    """The page with the tables of the code."""
    before, rest = page.split(START)
    return before + START + "\n" + tables() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
