"""Trains the tokenizers of the tiny 2.x checkpoints: byte-level BPE (2.5) and sentencepiece (2.0)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from finetune.tiny import corpus

MARKS = tuple(f"<{slash}{name}>" for name in ("image", "ref", "box", "quad", "point", "slice") for slash in ("", "/"))
MINICPM_SPECIALS = ("<unk>", "<s>", "</s>", *MARKS)
FIRST_MARK_ID = 101
SENTENCEPIECE_SIZE = 820
BASE_SIZE = 600
# Type of a piece that is neither special nor a byte, in sentencepiece_model.proto.
_NORMAL = 1
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<unk>",
    *(f"<|reserved_special_token_{slot}|>" for slot in (1, 2, 3)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *MARKS,
    *(f"<|reserved_special_token_{slot}|>" for slot in range(5, 11)),
)
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKEN_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def llama3_tokenizer() -> Tokenizer:
    """Byte-level BPE with the split of Llama-3; encode adds <|begin_of_text|>; specials follow the base vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(corpus.lines("\n\n", "\n\n"), trainer)
    if tokenizer.get_vocab_size() != BASE_SIZE:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens instead of {BASE_SIZE}")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in LLAMA3_SPECIALS])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), bos_template("<|begin_of_text|>", BASE_SIZE)]
    )
    return tokenizer


def minicpm_model() -> bytes:
    """A sentencepiece model, serialised: Llama style (byte fallback, dummy prefix), image tags from id 101."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=corpus.lines("<用户>", "<AI>"),
        model_writer=written,
        model_type="bpe",
        vocab_size=SENTENCEPIECE_SIZE,
        user_defined_symbols=list(MARKS),
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    proto = _parsed(written.getvalue())
    # The trainer puts the tags at 3..14; the published ids are 101..112.
    pieces = list(proto.pieces)
    marks = [piece for piece in pieces if piece.piece in MARKS]
    others = [piece for piece in pieces if piece.piece not in MARKS]
    del proto.pieces[:]
    proto.pieces.extend([*others[:FIRST_MARK_ID], *marks, *others[FIRST_MARK_ID:]])
    return proto.SerializeToString(deterministic=True)


def _parsed(model: bytes) -> Any:
    """A serialised sentencepiece model with its pieces; other fields are kept as they are.

    sentencepiece's own generated class is not used: that of 0.2.3 needs protobuf 7.36, which wandb and swanlab exclude.
    """
    file = descriptor_pb2.FileDescriptorProto(name="pieces.proto", package="pieces", syntax="proto2")
    piece, whole = file.message_type.add(name="Piece"), file.message_type.add(name="Model")
    kinds = descriptor_pb2.FieldDescriptorProto
    for number, (name, kind) in enumerate(
        (("piece", kinds.TYPE_STRING), ("score", kinds.TYPE_FLOAT), ("type", kinds.TYPE_INT32)), 1
    ):
        piece.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    piece.field[-1].default_value = str(_NORMAL)
    whole.field.add(
        name="pieces", number=1, type=kinds.TYPE_MESSAGE, type_name=".pieces.Piece", label=kinds.LABEL_REPEATED
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("pieces.Model")).FromString(model)


def minicpm_tokenizer(model: bytes) -> Tokenizer:
    """The sentencepiece model as a fast tokenizer with equal ids; encode adds <s>."""
    proto = _parsed(model)
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(proto, vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in MINICPM_SPECIALS])
    tokenizer.post_processor = bos_template("<s>", 1)
    return tokenizer


def write_llama3(folder: Path, chat_template: str) -> int:
    """Write the tokenizer files of MiniCPM-Llama3-V 2.5 into ``folder`` and give the length of the tokenizer."""
    tokenizer = llama3_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    config = {
        "added_tokens_decoder": added_tokens_decoder(tokenizer, LLAMA3_SPECIALS),
        "additional_special_tokens": list(MARKS),
        "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
        **names,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "MiniCPMVTokenizerFast",
        "unk_token": "<unk>",
    }
    write_json(folder / "tokenizer_config.json", config)
    specials = {name: {"content": token, **TOKEN_FLAGS} for name, token in {**names, "unk_token": "<unk>"}.items()}
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": list(MARKS), **specials})
    return tokenizer.get_vocab_size()


def write_minicpm(folder: Path) -> int:
    """Write the tokenizer files of MiniCPM-V 2.0 into ``folder`` and give the length of the tokenizer."""
    model = minicpm_model()
    tokenizer = minicpm_tokenizer(model)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added_tokens_decoder(tokenizer, MINICPM_SPECIALS),
        "additional_special_tokens": list(MARKS),
        "auto_map": {"AutoTokenizer": ["tokenization_minicpmv.MiniCPMVTokenizer", None]},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<unk>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "MiniCPMVTokenizer",
        "truncation_side": "right",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    specials = {name: {"content": token, **TOKEN_FLAGS} for name, token in names.items()}
    marks = {"additional_special_tokens": list(MARKS), "pad_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", {**marks, **specials})
    return tokenizer.get_vocab_size()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` in the layout of the published files: two spaces, characters as they are, final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def added_tokens_decoder(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The ``added_tokens_decoder`` entry: id as a string to content and flags."""
    return {str(tokenizer.token_to_id(token)): {"content": token, **TOKEN_FLAGS, "special": True} for token in tokens}


def bos_template(token: str, index: int) -> processors.TemplateProcessing:
    """A post-processor that puts the bos token in front of every sequence."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, index)]
    )


def _merges(proto: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merge rules that make a BPE out of scored pieces: every split of a piece into two pieces, best piece first."""
    rules = []
    for piece in proto.pieces:
        if piece.type != _NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in vocabulary and right in vocabulary:
                rules.append((-piece.score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(rules)]
