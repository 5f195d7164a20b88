"""The least number of tokens of a text is never above their true number."""

from __future__ import annotations

import unicodedata

import pytest
from golden_tokenizers import FAMILY, vocabulary, written
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.families import by_name
from finetune.sample import Message, Sample, Source, Text
from finetune.templates.token_bounds import longest_token
from finetune.templates.tokenizer_view import TokenizerView

_WORDS = ("a", " ", "\n", "  " * 20, "-" * 30, "dog", "é", "e\u0301", "\u1100\u1161\u11a8", "图", "😀", "<box>")
PIECES = st.sampled_from([*_WORDS, "<think>", "</think>"])
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=30).map("".join)


def names() -> list[str]:
    return [*FAMILY, "v2_6", "o4_5"]


def made(name: str) -> TokenizerView:
    if name in FAMILY:
        return vocabulary(name)
    return TokenizerView(written(name), by_name(name).control_tokens)


MADE: dict[str, TokenizerView] = {}


@pytest.mark.parametrize("name", names())
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_a_lower_bound(name: str, texts: list[str]) -> None:
    spelling = MADE.setdefault(name, made(name))
    texts = [text.encode(errors="ignore").decode() for text in texts]
    assert spelling.min_tokens(texts) <= sum(len(spelling.text(text)) for text in texts)
    assert spelling.min_tokens(texts) <= len(spelling.text("".join(texts)))


@pytest.mark.parametrize("name", names())
def test_there_is_a_bound(name: str) -> None:
    assert MADE.setdefault(name, made(name)).min_tokens(["word " * 100_000]) > 1000


def test_nfc_shortens_no_more_than_is_said() -> None:
    """Over all characters whose decomposition is composed again."""
    for number in range(0x110000):
        letter = chr(number)
        apart = unicodedata.normalize("NFD", letter)
        if apart != letter and unicodedata.normalize("NFC", apart) == letter:
            assert len(apart) <= 4
            assert len(apart.encode()) <= 3 * len(letter.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "Split", "behavior": "Removed"}},
        {"added_tokens": [{"content": "<x>", "lstrip": True}]},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "fuse_unk": True, "byte_fallback": False}},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
    ],
)
def test_steps_that_leave_text_out_or_are_unknown_give_no_bound(change: dict[str, object]) -> None:
    spec = {"model": {"type": "BPE", "vocab": {"aa": 0}}, "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    assert longest_token(spec).min_tokens(["a" * 9]) == 5
    assert longest_token(spec | change).min_tokens(["a" * 9]) == 0


def test_thinking_and_white_space_do_not_count() -> None:
    from finetune.encoding.length_policy import min_tokens

    class Encoder:
        prompt_tokenizer = MADE.setdefault("qwen", made("qwen"))

    turns = (("user", "Q" + " " * 5000), ("assistant", "<think>" + "x" * 5000 + "</think>\n\nA"))
    sample = Sample("", Source("a", 0), tuple(Message(role, (Text(text),)) for role, text in turns))
    assert min_tokens(Encoder(), sample) == 1  # pyright: ignore[reportArgumentType]
