"""The tokenizer as templates see it: control tokens come from the template alone, never from text."""

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
"""Tokens that users write on purpose: they become their ids where the tokenizer has them."""

_HIDDEN = "\U0010ffff{}\U0010ffff"
"""Name of a control token in our copy. U+10FFFF is no character; should a text hold one all the same, it is refused."""

_PARALLELISM, _OFF = "TOKENIZERS_PARALLELISM", ("", "off", "false", "f", "no", "n", "0")
"""The variable by which tokenizers is told to start no threads, and the values that it takes for no."""


class TextError(DataError):
    """Text that this tokenizer cannot represent; whoever knows the record adds where it is."""


class MissingTokenError(UserError):
    """A tokenizer without a token that the family needs."""


class TokenizerView:
    """Text to ids by a copy of the user's tokenizer in which the control tokens cannot be spelled.

    The copy differs from the original in its names for control tokens only, so every other text gets the original's
    ids. Control tokens are those named here and every other token flagged special that is not one of ``marks``.
    The object holds no state that encoding changes, can be shared between threads and can be pickled.

    Args:
        tokenizer: a fast tokenizer of transformers; it is read once and left as it is.
        control_tokens: tokens that steer the format.
        required_tokens: tokens that must have an id.
        marks: tokens that text may contain.

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
        """A number of tokens that texts have at least, from their length; see ``finetune.templates.token_bounds``."""
        return self._longest.min_tokens(texts)

    def has(self, token: str) -> bool:
        """Whether there is such a control token."""
        return token in self._ids

    def spelled(self, text: str) -> list[str]:
        """The names of control tokens that stand in a text, each once; they become plain letters."""
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
        """Ids of a piece of text that starts the prompt or follows a control token.

        Raises:
            TextError: a character that the tokenizer does not know.
        """
        return self._text_ids(self._tokenizer, text)

    def fixed(self, text: str) -> list[int]:
        """As ``text``, remembered: for the words of the template itself."""
        if text not in self._fixed:
            self._fixed[text] = self.text(text)
        return self._fixed[text]

    def continuation(self, text: str) -> list[int]:
        """Ids of text that goes on where other text stopped: without the word-start piece of sentencepiece.

        Raises:
            TextError: a character that the tokenizer does not know.
        """
        if self._bare is None:
            return self.text(text)
        mark = self._kept.search(text) if self._kept else None
        head = text if mark is None else text[: mark.start()]
        ids = self._text_ids(self._bare, head)
        return ids if mark is None else ids + self.text(text[mark.start() :])

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As ``text``, with the half-open character range of every id.

        A word-start piece that stands for no character has the range of the character after it.

        Raises:
            TextError: a character that the tokenizer does not know.
        """
        encoding = self._encode(self._tokenizer, text)
        return encoding.ids, encoding.offsets

    def _text_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The ids alone, for which the tokenizer need not keep track of characters: a quarter of its time."""
        if os.environ.get(_PARALLELISM, "on").lower() not in _OFF:
            # Only batches can do without, and by default they start threads, which a process must not have to fork.
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
            raise TextError(
                f"the tokenizer has no id of its own for {text[first:last]!r} (character {first} of {text[:40]!r}...): "
                f"it would become the control token {self._names[ids[at]]}; remove the character"
            )
        return encoding


def _no_text(text: str) -> TextError:
    """The error for what the tokenizer takes for no text: it has half of a surrogate pair in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 20, 0) : error.start + 20]
        return TextError(f"half of a surrogate pair in {around!r}: write the whole character or remove it")
    return TextError(f"{shown(text)} is no text to the tokenizer")


def _hide(spec: dict[str, Any], banned: set[str]) -> None:
    """Renames the banned tokens of a serialised tokenizer, in place, and takes away the merges that spell them."""
    model, added = spec["model"], spec["added_tokens"]
    vocab = model["vocab"]
    hidden = {token["content"]: _HIDDEN.format(token["id"]) for token in added if token["content"] in banned}
    # Post-processing adds bos and trims offsets; padding and truncation are ours to do.
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
    """Gives Llama tokenizers the word-start piece in front of every chunk, as sentencepiece has it.

    The Llama class of transformers 5 leaves the piece out where a chunk starts with a space; the published models were
    trained by sentencepiece, and their tokenizer.json agrees with it.
    """
    before = spec["pre_tokenizer"]
    if before and before["type"] == "Metaspace" and before["prepend_scheme"] == "always" and not before["split"]:
        mark = before["replacement"]
        steps = [{"type": "Prepend", "prepend": mark}, {"type": "Replace", "pattern": {"String": " "}, "content": mark}]
        old = spec["normalizer"]
        spec["normalizer"] = {"type": "Sequence", "normalizers": [*([old] if old else []), *steps]}
        spec["pre_tokenizer"] = None


def _without_prefix(spec: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that does not put a word-start piece in front, or None when this one never does."""
    normalizer = spec["normalizer"]
    if not normalizer or normalizer["type"] != "Sequence":
        return None
    steps = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
    if len(steps) == len(normalizer["normalizers"]):
        return None
    return Tokenizer.from_str(json.dumps(spec | {"normalizer": normalizer | {"normalizers": steps}}))
