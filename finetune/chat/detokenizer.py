"""Tokens as they arrive become text, in pieces that together are the whole answer."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from finetune.evaluation.batched_generation import answer_text

# A byte of a character that the vocabulary lacks (sentencepiece); its neighbours decide what it means.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNFINISHED = "\ufffd"


class IncrementalDetokenizer:
    """The text of an answer that is still being written.

    A piece is given out only when no later token can change it: white space at the end may be the answer's last, and
    half a character waits for its other half.

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
        """What can be given out now that ``token`` has come; often nothing."""
        self._ids.append(token)
        if token not in self._stops and _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""
        return self._give(answer_text(self._tokenizer, self._ids, self._stops).rstrip(_UNFINISHED).rstrip())

    def rest(self) -> str:
        """What is left when no token comes any more."""
        return self._give(answer_text(self._tokenizer, self._ids, self._stops))

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece
