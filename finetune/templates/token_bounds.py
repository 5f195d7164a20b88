"""The least number of tokens that text can have, from its length alone: what cannot fit need not be tokenised.

Every token stands for a piece of the text, so there are at least as many as the length of the text over the length of
the longest piece. That is sound only where no step of the tokenizer leaves text out or lets one token stand for more
than its own letters; every step is looked at, and one that is not known here makes the bound 0.

- Byte-level BPE: a token is written with one letter per byte of the text, so lengths are counted in bytes.
- Sentencepiece's BPE as tokenizer.json has it: a token is written with the letters of the text, a space as one mark,
  and a letter that is in no token becomes its bytes, one token each: lengths are counted in letters. Without these
  bytes unknown letters are joined into one token, and there is no bound.
- Normalisation to NFC makes UTF-8 shorter, at most to a third of its bytes (three jamo of three bytes become a syllable
  of three), and at most four letters one: by Unicode's own tables of the largest growth of the inverse (NFD).
- An added token that takes the white space beside it stands for any amount of it: there is no bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# How many times shorter NFC makes text at most.
_NFC_BYTES, _NFC_LETTERS = 3, 4


@dataclass(frozen=True, slots=True)
class Longest:
    """The most text that a token stands for.

    Attributes:
        length: in bytes or letters, 0 where there is no bound.
        in_bytes: which of them.
    """

    length: int
    in_bytes: bool

    def min_tokens(self, texts: Iterable[str]) -> int:
        """A number of tokens that texts have at least together, however they are joined."""
        if not self.length:
            return 0
        total = sum(len(text.encode(errors="surrogatepass")) if self.in_bytes else len(text) for text in texts)
        return -(-total // self.length)


def longest_token(spec: Mapping[str, Any]) -> Longest:
    """The most text that a token of a serialised tokenizer stands for."""
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
    """How many times shorter the normaliser makes text at most; 0 where that is not known."""
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
    """Whether a pre-tokenizer keeps all of the text."""
    if step["type"] in ("Split", "Punctuation"):
        return step.get("behavior") != "Removed"
    return step["type"] in ("ByteLevel", "Metaspace", "Digits")
