"""HTML rendering with jinja2: text is escaped, control characters are made visible, no external resources."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import finetune
from finetune.pages.long_text import shorten
from finetune.utils.errors import UserError
from finetune.utils.quoting import plain


class PageError(UserError):
    """A page cannot be rendered or written."""


def render(template: str, **values: Any) -> str:
    """Renders a page.

    Args:
        template: name of a file in ``templates``, without its suffix.
        **values: variables of the template; strings are escaped.

    Raises:
        PageError: the template cannot be rendered.
    """
    try:
        return _environment().get_template(f"{template}.html").render(**values)
    except jinja2.TemplateError as error:
        raise PageError(f"the page {template!r} cannot be rendered ({error}); please report this") from error


def write(path: Path, page: str) -> None:
    """Writes a page atomically.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def count(number: float, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    >>> count(1, "image"), count(1200, "record"), count(2, "box", "boxes")
    ('1 image', '1,200 records', '2 boxes')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("finetune.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["count"] = count
    made.filters["shorten"] = shorten
    made.globals["version"] = finetune.__version__
    for name in ("style.css", "script.js"):
        source, _, _ = jinja2.PackageLoader("finetune.pages").get_source(made, name)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        # The content security policy of the page allows exactly these bytes to run.
        made.globals[name.partition(".")[0]] = {"source": Markup(source), "hash": f"sha256-{digest}"}  # noqa: S704
    return made


def _shown(value: Any) -> Any:
    if isinstance(value, (Markup, jinja2.Undefined, int, float)):
        return value
    return plain(str(value))
