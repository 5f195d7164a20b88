"""A fast tokenizer with Qwen's rules from vocab.json and merges.txt (folders without tokenizer.json, as 4.5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from finetune.errors import CheckpointError

# Contractions, words with one leading sign, single digits, signs with their line breaks, line breaks, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_vocabulary(vocabulary: Path, merges: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The fast tokenizer of a byte-level BPE.

    Args:
        vocabulary: vocab.json.
        merges: merges.txt.
        added: tokens by id that are found before anything else, as tokenizer_config.json or added_tokens.json has them.

    Raises:
        CheckpointError: an added token that cannot have its id.
    """
    vocab, pairs = BPE.read_file(str(vocabulary), str(merges))
    tokenizer = Tokenizer(BPE(vocab, pairs))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Ids are given in order, so holes would move the tokens behind them.
    tokenizer.add_tokens([token for _, token in sorted(added.items())])
    for index, token in added.items():
        found = tokenizer.token_to_id(token.content)
        if found != index:
            raise CheckpointError(
                f"{vocabulary.parent}: {token.content!r} has id {index} in tokenizer_config.json or added_tokens.json, "
                f"but {vocabulary.name} and the added tokens before it give it {found}; these files do not belong "
                "together, put the published ones back"
            )
    return tokenizer
