"""What a browser makes of a page, as far as tests need it."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

_LOADING = ("src", "href", "srcset", "action", "data", "poster", "formaction")


class Page(HTMLParser):
    """Tags with their attributes, and the text between them; styles and scripts aside."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.code: list[tuple[str, str]] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("style", "script") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside:
            self.code.append((self._inside, data))
        else:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_safe(page: str) -> Page:
    """Nothing is loaded, nothing but the page's own script can run, and no control character is left."""
    seen = Page(page)
    for tag, attributes in seen.tags:
        assert tag not in ("iframe", "object", "embed", "link", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name in _LOADING:
                assert (value or "").startswith(("#", "data:image/jpeg;base64,")), (tag, name, (value or "")[:60])
    policy = next(each["content"] for each in seen.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert [name for name, _ in seen.code] == ["style", "script"]
    for _, code in seen.code:
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
        assert not re.search(r"url\(|@import|fetch|XMLHttp|import\(", code)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200b\ufeff\ud800-\udfff]", page)
    return seen
