"""The recorded small tokenizers of tests/golden/encode, loaded once."""

import tempfile
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.commands import tiny_chatml
from finetune.families import by_name
from finetune.models import load_tokenizer
from finetune.templates.tokens import Vocabulary

FOLDER = Path(__file__).parent / "golden" / "encode" / "tokenizers"
FAMILY = {"llama3": "llama3_v2_5", "minicpm": "v2_0", "qwen": "v4_5"}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FOLDER / name)


@cache
def vocabulary(name: str) -> Vocabulary:
    tokens = by_name(FAMILY[name]).control_tokens
    return Vocabulary(tokenizer(name), tokens, tokens)


@cache
def written(family: str) -> PreTrainedTokenizerBase:
    """The small tokenizer of a ChatML generation with its chat template, as the tiny checkpoints have it."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_chatml.write_chatml(Path(folder), family)
        return load_tokenizer(folder)
