"""Incremental detokenizer for streaming: text chunks whose concatenation is the full answer."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from finetune.evaluation.batched_generation import answer_text

# Byte fallback of sentencepiece: a byte of a character outside the vocabulary, decodable only with its neighbours.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNFINISHED = "\ufffd"


class IncrementalDetokenizer:
    """Decodes generated tokens one at a time.

    Text is emitted only when no later token can change it: trailing white space is held back because it is stripped at
    the end of an answer, and an incomplete UTF-8 sequence until it is complete.

    Args:
        tokenizer: the checkpoint's.
        stops: ids that end the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """The text that ``token`` completes; often empty."""
        self._ids.append(token)
        if token not in self._stops and _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""
        return self._give(answer_text(self._tokenizer, self._ids, self._stops).rstrip(_UNFINISHED).rstrip())

    def rest(self) -> str:
        """The remaining text, once generation has ended."""
        return self._give(answer_text(self._tokenizer, self._ids, self._stops))

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        chunk, self._given = text[len(self._given) :], text
        return chunk
