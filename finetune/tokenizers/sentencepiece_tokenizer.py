"""Builds a fast tokenizer with Llama's legacy rules from tokenizer.model, for V-2.0 folders without tokenizer.json.

The converter of transformers 5 does not prepend the word-start piece, so that its ids differ from the published ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from finetune.utils.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection

    from sentencepiece import SentencePieceProcessor

_SPACE = "▁"
_PROBES = ("Hello world", " two  spaces ", "line\n\n\tend", "你好，世界！", "Ａ１ ﬁ é", "😀 1,234.5%", "don't <AI>")


def from_sentencepiece(path: Path, special: Collection[str], *, add_bos: bool = True) -> Tokenizer:
    """The fast tokenizer of a sentencepiece BPE model.

    Args:
        path: tokenizer.model.
        special: pieces that are special tokens, in addition to the model's control pieces: they are matched first and
            never produced by merges.
        add_bos: whether every encoding starts with the model's beginning-of-sequence piece.

    Raises:
        CheckpointError: ids differ from those of sentencepiece.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    control = {
        piece for index, piece in enumerate(pieces) if processor.is_control(index) or processor.is_unknown(index)
    }
    special = control.union(special)
    model = BPE(
        vocab=vocabulary,
        merges=_merges(processor, vocabulary, special),
        unk_token=pieces[processor.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _check(tokenizer, processor, path)
    marks = [piece for piece in pieces if piece in special]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    if add_bos:
        bos = pieces[processor.bos_id()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, processor.bos_id())]
        )
    return tokenizer


def _merges(
    processor: SentencePieceProcessor, vocabulary: dict[str, int], special: Collection[str]
) -> list[tuple[str, str]]:
    """All merges of two pieces into a third, highest score first.

    Sentencepiece merges the pair whose result has the highest score; a merge list has the same priority by its order.
    """
    ordinary = {piece for piece, index in vocabulary.items() if piece not in special and not processor.is_byte(index)}
    ranked = sorted(ordinary, key=lambda piece: (-processor.get_score(vocabulary[piece]), vocabulary[piece]))
    merges = []
    for piece in ranked:
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += sorted(
            (pair for pair in splits if ordinary.issuperset(pair)), key=lambda pair: [vocabulary[half] for half in pair]
        )
    return merges


def _check(tokenizer: Tokenizer, processor: SentencePieceProcessor, path: Path) -> None:
    for probe in _PROBES:
        ours, theirs = tokenizer.encode(probe, add_special_tokens=False).ids, processor.encode(probe)
        if ours != theirs:
            raise CheckpointError(
                f"{path}: {probe!r} is {theirs} by sentencepiece and {ours} by Llama's legacy rules, so this model "
                "uses other rules; put the checkpoint's tokenizer.json beside it"
            )
