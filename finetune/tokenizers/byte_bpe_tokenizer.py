"""Builds Qwen's byte-level BPE tokenizer from vocab.json and merges.txt, for folders without tokenizer.json (4.5)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from finetune.utils.errors import CheckpointError

# Contractions, words with one leading symbol, single digits, symbols with line breaks, line breaks, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_vocabulary(vocabulary: Path, merges: Path, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The fast tokenizer of a byte-level BPE.

    Args:
        vocabulary: vocab.json.
        merges: merges.txt.
        added: added tokens by id, from tokenizer_config.json or added_tokens.json.

    Raises:
        CheckpointError: missing merges, or an added token that cannot have its id.
    """
    vocab, pairs = BPE.read_file(str(vocabulary), str(merges))
    _check_merges(vocabulary, vocab, pairs, {token.content for token in added.values()})
    tokenizer = Tokenizer(BPE(vocab, pairs))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Ids are assigned in order, so gaps would shift the following tokens.
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


def _check_merges(
    vocabulary: Path, vocab: Mapping[str, int], pairs: Iterable[tuple[str, str]], added: Collection[str]
) -> None:
    """Checks that every entry of the vocabulary is a byte, a merge of two entries, or an added token.

    Tokens without a merge are never produced: text would silently be split into other, shorter tokens.

    Raises:
        CheckpointError: saying how many merges are missing and what to do.
    """
    built = {left + right for left, right in pairs}
    lost = [entry for entry in vocab if len(entry) > 1 and entry not in built and entry not in added]
    if lost:
        read = decoders.ByteLevel()
        shown = ", ".join(repr(read.decode([entry])) for entry in lost[:3])
        raise CheckpointError(
            f"{vocabulary.parent}: tokenizer.json is missing; this merges.txt lacks {len(lost)} merges: as many of "
            f"the {len(vocab)} entries of {vocabulary.name} cannot be produced ({shown}, ...), and text with them "
            "would get other tokens than in pretraining. Put the published tokenizer.json into the folder"
        )
