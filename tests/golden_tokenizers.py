"""The recorded small tokenizers of tests/golden/encode, loaded once."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.families import by_name
from finetune.models import load_tokenizer
from finetune.templates.tokenizer_view import TokenizerView
from finetune.tiny import chatml_tokenizers

FOLDER = Path(__file__).parent / "golden" / "encode" / "tokenizers"


def small_images(query_num: int = 4, side: int = 56) -> dict[str, Any]:
    """Settings of a checkpoint that looks at slices of this side."""
    return {
        "query_num": query_num,
        "slice_config": {"max_slice_nums": 9, "scale_resolution": side, "patch_size": 14},
        "scale_resolution": side,  # where 2.0 has it
    }


SMALL_IMAGES = small_images()
FAMILY = {"llama3": "llama3_v2_5", "minicpm": "v2_0", "qwen": "v4_5"}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FOLDER / name)


@cache
def vocabulary(name: str) -> TokenizerView:
    tokens = by_name(FAMILY[name]).control_tokens
    return TokenizerView(tokenizer(name), tokens, tokens)


@cache
def written(family: str) -> PreTrainedTokenizerBase:
    """The small tokenizer of a ChatML generation with its chat template, as the tiny checkpoints have it."""
    with tempfile.TemporaryDirectory() as folder:
        chatml_tokenizers.write_chatml(Path(folder), family)
        return load_tokenizer(folder)
