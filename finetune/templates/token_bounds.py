"""Lower bound of the number of tokens of a text by its length, to skip tokenizing texts that cannot fit.

The bound is the length of the text divided by the length of the longest token. It holds only if no step of the
tokenizer drops text or lets a token cover more text than its own characters; every step is checked, and an unknown one
makes the bound 0.

- Byte-level BPE: one character of a token per byte of text, so lengths are in bytes.
- Sentencepiece BPE in tokenizer.json: one character of a token per character of text, and one byte token per byte of an
  unknown character: lengths are in characters. Without byte fallback unknown characters are fused into one token, and
  there is no bound.
- NFC normalization shortens text at most to a third of its UTF-8 bytes (three jamo of three bytes become one syllable
  of three bytes) and at most four characters to one, by Unicode's tables for the expansion of NFD.
- An added token that strips white space beside it covers any amount of it: there is no bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Largest factor by which NFC shortens text.
_NFC_BYTES, _NFC_LETTERS = 3, 4


@dataclass(frozen=True, slots=True)
class Longest:
    """The maximum length of the text of a token.

    Attributes:
        length: in bytes or characters, 0 if there is no bound.
        in_bytes: whether it is in bytes.
    """

    length: int
    in_bytes: bool

    def min_tokens(self, texts: Iterable[str]) -> int:
        """Lower bound of the number of tokens of all texts, however they are joined."""
        if not self.length:
            return 0
        total = sum(len(text.encode(errors="surrogatepass")) if self.in_bytes else len(text) for text in texts)
        return -(-total // self.length)


def longest_token(spec: Mapping[str, Any]) -> Longest:
    """The maximum text length of a token of a serialized tokenizer (tokenizer.json)."""
    model, added = spec["model"], spec["added_tokens"]
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    in_bytes = any(step["type"] == "ByteLevel" for step in steps)
    shorter = _shortening(_steps(spec.get("normalizer"), "normalizers"), in_bytes)
    whole = (
        model["type"] == "BPE" and not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    )
    whole = whole and bool(in_bytes or model.get("byte_fallback") or not model.get("fuse_unk"))
    stretching = any(token.get("lstrip") or token.get("rstrip") for token in added)
    if not whole or stretching or not shorter or not all(map(_keeps, steps)):
        return Longest(0, in_bytes)
    names = [len(token["content"].encode()) if in_bytes else len(token["content"]) for token in added]
    return Longest(shorter * max([*map(len, model["vocab"]), *names]), in_bytes)


def _steps(given: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer."""
    if given is None:
        return []
    if given["type"] == "Sequence":
        return [step for each in given[key] for step in _steps(each, key)]
    return [given]


def _shortening(steps: list[Mapping[str, Any]], in_bytes: bool) -> int:
    """Largest factor by which the normalizer shortens text; 0 if unknown."""
    shorter = 1
    for step in steps:
        if step["type"] == "NFC":
            shorter *= _NFC_BYTES if in_bytes else _NFC_LETTERS
        elif step["type"] == "Replace":
            old, new = step["pattern"].get("String"), step["content"]
            grows = old is not None and (len(new.encode()) >= len(old.encode()) if in_bytes else len(new) >= len(old))
            if not grows:
                return 0
        elif step["type"] != "Prepend":
            return 0
    return shorter


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer keeps all text."""
    if step["type"] in ("Split", "Punctuation"):
        return step.get("behavior") != "Removed"
    return step["type"] in ("ByteLevel", "Metaspace", "Digits")
