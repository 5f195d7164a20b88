"""The recorded small tokenizers of tests/golden/encode, loaded once."""

from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from finetune.families import by_name
from finetune.templates.tokens import Vocabulary

FOLDER = Path(__file__).parent / "golden" / "encode" / "tokenizers"
FAMILY = {"llama3": "llama3_v2_5", "minicpm": "v2_0"}
# No family of ours uses qwen yet: the tokens that its template writes.
QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<unk>", "<image>", "</image>", "<slice>", "<image_id>")


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FOLDER / name)


@cache
def vocabulary(name: str) -> Vocabulary:
    tokens = by_name(FAMILY[name]).control_tokens if name in FAMILY else QWEN
    return Vocabulary(tokenizer(name), tokens, tokens)
