"""Tokenizers of published folders and of adapters, without running the code that the folders name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.errors import CheckpointError
from finetune.families.base import Family
from finetune.models.sentencepiece_tokenizer import from_sentencepiece

_FILES = ("tokenizer.json", "tokenizer.model")


class MiniCPMVTokenizerFast(PreTrainedTokenizerFast):
    """The class that published tokenizer_config.json files name; it adds nothing to what tokenizer.json says."""

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Builds the tokenizer from tokenizer.model when there is no tokenizer.json."""
        model, ready = kwargs.get("vocab_file"), kwargs.get("tokenizer_file")
        if ready is None and model is not None and Path(model).is_file():
            added = kwargs.get("added_tokens_decoder") or {}
            special = {token["content"] if isinstance(token, dict) else str(token) for token in added.values()}
            add_bos = kwargs.get("add_bos_token", True)
            kwargs["tokenizer_object"] = from_sentencepiece(Path(model), special, add_bos=add_bos)
            return kwargs
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)


class MiniCPMVTokenizer(MiniCPMVTokenizerFast):
    """The same under the name that V-2.0 uses."""


class _TokenizerOnly(PretrainedConfig):
    """Carries the registration below.

    Registered for MiniCPMVConfig instead, ``trust_remote_code=True`` would ask for the folder's own code again.
    """

    model_type: ClassVar[str] = "minicpmv_tokenizer_only"


def register() -> None:
    """Makes AutoTokenizer know the classes by name, which serves model and adapter folders alike."""
    AutoTokenizer.register(
        _TokenizerOnly, slow_tokenizer_class=MiniCPMVTokenizer, fast_tokenizer_class=MiniCPMVTokenizerFast
    )


def load_tokenizer(folder: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder, or of a hub id.

    Args:
        folder: local folder with tokenizer.json or tokenizer.model, or a hub id.
        **kwargs: handed on to ``from_pretrained`` (revision, cache_dir, ...).

    Raises:
        CheckpointError: the folder has no tokenizer files.
    """
    path = Path(folder)
    if path.is_dir() and not any((path / name).is_file() for name in _FILES):
        raise CheckpointError(f"{path} has no tokenizer: {' or '.join(_FILES)} is missing")
    named = _declared_class(path) if path.is_dir() else ""
    chosen = MiniCPMVTokenizer if named == "MiniCPMVTokenizer" else MiniCPMVTokenizerFast
    return chosen.from_pretrained(folder, **kwargs)


def _declared_class(folder: Path) -> str:
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class", "") if file.is_file() else ""


def check_tokens(tokenizer: PreTrainedTokenizerBase, family: Family, vocab_size: int, name: str) -> None:
    """Checks that every token the family needs is one id, and that every id has an embedding.

    Args:
        tokenizer: the checkpoint's tokenizer.
        family: the checkpoint's family.
        vocab_size: rows of the embedding table.
        name: the checkpoint, for the message.

    Raises:
        CheckpointError: naming the tokens.
    """
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in family.required_tokens if token not in vocabulary]:
        raise CheckpointError(
            f"the tokenizer of {name} does not know {', '.join(missing)}, which {family.title} needs: the tokenizer "
            "files belong to another model"
        )
    if max(vocabulary.values()) >= vocab_size:
        token = max(vocabulary, key=lambda name: vocabulary[name])
        raise CheckpointError(
            f"{token!r} has id {vocabulary[token]} in the tokenizer of {name}, but its network has {vocab_size} "
            "embeddings: the tokenizer files belong to another model"
        )
