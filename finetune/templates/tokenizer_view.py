"""``TokenizerView``: the tokenizer of the templates, in which text cannot produce control tokens."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from tokenizers import Encoding, Tokenizer

from finetune.sample import DataError
from finetune.templates.token_bounds import longest_token
from finetune.utils.errors import UserError
from finetune.utils.quoting import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<point>", "</point>")
THINKING = ("<think>", "</think>")
MARKS = (*GROUNDING, *THINKING)
"""Special tokens that text may contain: they are encoded as tokens if the tokenizer has them."""

_HIDDEN = "\U0010ffff{}\U0010ffff"
"""Name of a control token in our copy. U+10FFFF is a noncharacter; text that contains it is refused."""

_PARALLELISM, _OFF = "TOKENIZERS_PARALLELISM", ("", "off", "false", "f", "no", "n", "0")
"""The variable that disables threads in tokenizers, and the values that mean no."""


class MissingTokenError(UserError):
    """A tokenizer without a token that the family needs."""


class TokenizerView:
    """Encodes text with a copy of the tokenizer whose control tokens have been renamed.

    All other text gets the same ids as with the original. Control tokens are ``control_tokens`` and every other special
    token that is not in ``marks``. Encoding does not change the object; it is thread-safe and can be pickled.

    Args:
        tokenizer: a fast tokenizer of transformers; it is not modified.
        control_tokens: control tokens of the prompt format.
        required_tokens: tokens that must have an id.
        marks: special tokens that text may contain.

    Raises:
        MissingTokenError: a required token has no id of its own, or the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        control_tokens: Iterable[str],
        required_tokens: Iterable[str] = (),
        marks: Iterable[str] = MARKS,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise MissingTokenError(
                f"{type(tokenizer).__name__} from {tokenizer.name_or_path!r} is not a fast tokenizer; "
                "its folder needs a tokenizer.json"
            )
        spec = json.loads(backend.to_str())
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        banned = (special | set(control_tokens)) - set(marks)
        self._ids = {token: cast(int, found) for token in banned if (found := backend.token_to_id(token)) is not None}
        missing = [token for token in required_tokens if token not in self._ids]
        if missing:
            raise MissingTokenError(
                f"the tokenizer from {tokenizer.name_or_path!r} has no {', '.join(missing)}; "
                "it belongs to another model, or its added tokens were lost"
            )
        self._names = {number: token for token, number in self._ids.items()}
        self._spelled = re.compile("|".join(re.escape(token) for token in sorted(self._ids, key=len, reverse=True)))
        _hide(spec, set(self._ids))
        _prefix_every_chunk(spec)
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))
        self._bare = _without_prefix(spec)
        hidden = {_HIDDEN.format(number) for number in self._names}
        kept = [token["content"] for token in spec["added_tokens"] if token["content"] not in hidden]
        kept.sort(key=len, reverse=True)
        self._kept = re.compile("|".join(map(re.escape, kept))) if kept else None
        self._fixed: dict[str, list[int]] = {}
        self._longest = longest_token(spec)

    def min_tokens(self, texts: Iterable[str]) -> int:
        """Lower bound of the number of tokens of the texts; see ``finetune.templates.token_bounds``."""
        return self._longest.min_tokens(texts)

    def has(self, token: str) -> bool:
        """Whether there is such a control token."""
        return token in self._ids

    def spelled(self, text: str) -> list[str]:
        """The distinct control token names in a text; they are encoded as plain text."""
        return list(dict.fromkeys(self._spelled.findall(text)))

    def control(self, token: str) -> int:
        """The id of a control token.

        Raises:
            MissingTokenError: the tokenizer has no such token.
        """
        if token not in self._ids:
            raise MissingTokenError(f"the tokenizer has no control token {token!r}")
        return self._ids[token]

    def text(self, text: str) -> list[int]:
        """Ids of text at the start of the prompt or after a control token.

        Raises:
            DataError: a character that the tokenizer does not know.
        """
        return self._text_ids(self._tokenizer, text)

    def fixed(self, text: str) -> list[int]:
        """As ``text``, cached: for the constant strings of a template."""
        if text not in self._fixed:
            self._fixed[text] = self.text(text)
        return self._fixed[text]

    def continuation(self, text: str) -> list[int]:
        """Ids of text that continues other text: without the word-start token of sentencepiece.

        Raises:
            DataError: a character that the tokenizer does not know.
        """
        if self._bare is None:
            return self.text(text)
        mark = self._kept.search(text) if self._kept else None
        head = text if mark is None else text[: mark.start()]
        ids = self._text_ids(self._bare, head)
        return ids if mark is None else ids + self.text(text[mark.start() :])

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``text``, with the half-open character range of every id.

        A word-start token without a character of its own has the range of the next character.

        Raises:
            DataError: a character that the tokenizer does not know.
        """
        encoding = self._encode(self._tokenizer, text)
        return encoding.ids, encoding.offsets

    def _text_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The ids without character offsets, which saves about a quarter of the time."""
        if os.environ.get(_PARALLELISM, "on").lower() not in _OFF:
            # Only batch encoding can skip offsets, and by default it starts threads, which are unsafe before a fork.
            return self._encode(tokenizer, text).ids
        try:
            ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except TypeError as error:
            raise _no_text(text) from error
        return ids if self._names.keys().isdisjoint(ids) else self._encode(tokenizer, text).ids

    def _encode(self, tokenizer: Tokenizer, text: str) -> Encoding:
        try:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise _no_text(text) from error
        ids = encoding.ids
        if not self._names.keys().isdisjoint(ids):
            at = next(index for index, number in enumerate(ids) if number in self._names)
            first, last = encoding.offsets[at]
            raise DataError(
                f"the tokenizer has no id of its own for {text[first:last]!r} (character {first} of {text[:40]!r}...): "
                f"it would become the control token {self._names[ids[at]]}; remove the character"
            )
        return encoding


def _no_text(text: str) -> DataError:
    """The error for text that the tokenizer rejects: it contains a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 20, 0) : error.start + 20]
        return DataError(
            f"lone surrogate (half of a surrogate pair) in {around!r}: write the full character or remove it"
        )
    return DataError(f"{shown(text)} is rejected by the tokenizer")


def _hide(spec: dict[str, Any], banned: set[str]) -> None:
    """Renames the banned tokens of a serialized tokenizer in place, and removes the merges that produce them."""
    model, added = spec["model"], spec["added_tokens"]
    vocab = model["vocab"]
    hidden = {token["content"]: _HIDDEN.format(token["id"]) for token in added if token["content"] in banned}
    # Post-processing would add bos and trim offsets; padding and truncation are done elsewhere.
    spec.update(post_processor=None, padding=None, truncation=None)
    for token in added:
        token["content"] = hidden.get(token["content"], token["content"])
    if model["type"] != "BPE":
        return
    hidden |= {token: _HIDDEN.format(vocab[token]) for token in banned if token in vocab}
    model["vocab"] = {hidden.get(token, token): number for token, number in vocab.items()}
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
    model["merges"] = [pair for pair in pairs if hidden.keys().isdisjoint((*pair, "".join(pair)))]


def _prefix_every_chunk(spec: dict[str, Any]) -> None:
    """Makes Llama tokenizers add the word-start token to every text, as sentencepiece does.

    The Llama class of transformers 5 omits it if a text starts with a space; the published models were trained with
    sentencepiece, and their tokenizer.json agrees with it.
    """
    before = spec["pre_tokenizer"]
    if before and before["type"] == "Metaspace" and before["prepend_scheme"] == "always" and not before["split"]:
        mark = before["replacement"]
        steps = [{"type": "Prepend", "prepend": mark}, {"type": "Replace", "pattern": {"String": " "}, "content": mark}]
        old = spec["normalizer"]
        spec["normalizer"] = {"type": "Sequence", "normalizers": [*([old] if old else []), *steps]}
        spec["pre_tokenizer"] = None


def _without_prefix(spec: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer without the word-start token, or None if this one never adds it."""
    normalizer = spec["normalizer"]
    if not normalizer or normalizer["type"] != "Sequence":
        return None
    steps = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
    if len(steps) == len(normalizer["normalizers"]):
        return None
    return Tokenizer.from_str(json.dumps(spec | {"normalizer": normalizer | {"normalizers": steps}}))
