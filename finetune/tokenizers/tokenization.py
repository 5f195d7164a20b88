"""Loads tokenizers of model and adapter folders without remote code, and checks their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.families.common import IMAGE_PAD, VIDEO_PAD
from finetune.families.family import Family
from finetune.model_folders import file_schemas
from finetune.model_folders.checkpoint_folder import check_side_files
from finetune.model_folders.duplex_prompt import NATIVE, O45_FC, check_published_ids
from finetune.templates.duplex_fc import NEW_TOKENS
from finetune.tokenizers.byte_bpe_tokenizer import from_vocabulary
from finetune.tokenizers.sentencepiece_tokenizer import from_sentencepiece
from finetune.utils.errors import CheckpointError, UserError
from finetune.utils.json_objects import read_object, shown

_PLACEHOLDERS = {"image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD}
_QWEN2_DEFAULTS = ("unk_token", "eos_token", "pad_token")
# Any of these is a tokenizer.
_FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


class MiniCPMVTokenizerFast(PreTrainedTokenizerFast):
    """The class named in published tokenizer_config.json files; the files of the folder define everything."""

    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "vocab.json",
        "merges_file": "merges.txt",
        "tokenizer_file": "tokenizer.json",
        "model_file": "tokenizer.model",
    }

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Builds the tokenizer from vocab.json and merges.txt, or tokenizer.model, when there is no tokenizer.json.

        Raises:
            CheckpointError: the files contradict each other.
        """
        vocabulary, merges, model = (kwargs.pop(key, None) for key in ("vocab_file", "merges_file", "model_file"))
        if kwargs.get("tokenizer_file") is None:
            added = kwargs.get("added_tokens_decoder") or {}
            if vocabulary is not None and merges is not None:
                kwargs["tokenizer_object"] = from_vocabulary(Path(vocabulary), Path(merges), added)
                return kwargs
            if model is not None:
                special = {str(token) for token in added.values()}
                add_bos = kwargs.get("add_bos_token", True)
                kwargs["tokenizer_object"] = from_sentencepiece(Path(model), special, add_bos=add_bos)
                return kwargs
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)


class MiniCPMOTokenizerFast(MiniCPMVTokenizerFast):
    """The same under the name that the o models use.

    The published class derives from Qwen2's, which takes <|endoftext|> where the files name no special token at all, as
    those of minicpm-o5-sdk: this class is registered under its name, so that it loads them too.
    """

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As the base class, with those tokens."""
        if not any(kwargs.get(name) for name in ("bos_token", *_QWEN2_DEFAULTS)):
            kwargs |= dict.fromkeys(_QWEN2_DEFAULTS, "<|endoftext|>")
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)


class MiniCPMVTokenizer(MiniCPMVTokenizerFast):
    """The same under the name that V-2.0 uses."""


_CLASSES = {chosen.__name__: chosen for chosen in (MiniCPMVTokenizerFast, MiniCPMOTokenizerFast, MiniCPMVTokenizer)}


def load_tokenizer(folder: str | Path, *, duplex_prompt: str = NATIVE, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder, or of a hub id.

    Args:
        folder: local folder with tokenizer.json, vocab.json and merges.txt, or tokenizer.model; or a hub id.
        duplex_prompt: "o45_fc" also gives it the tokens of that prompt.
        **kwargs: passed to ``from_pretrained`` (revision, cache_dir, ...).

    Raises:
        CheckpointError: the folder has no tokenizer files, or they contradict each other.
    """
    path = Path(folder)
    if path.is_dir() and not any(all((path / name).is_file() for name in form) for form in _FORMS):
        forms = ", ".join(" with ".join(form) for form in _FORMS)
        raise CheckpointError(f"{path} has no tokenizer: it needs one of {forms}")
    with tokenizer_errors(path):
        named = _declared_class(path) if path.is_dir() else ""
        tokenizer = _CLASSES.get(named, MiniCPMVTokenizerFast).from_pretrained(folder, **kwargs)
    if duplex_prompt == O45_FC:
        check_published_ids(tokenizer.get_vocab(), str(folder))
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in NEW_TOKENS])
    return tokenizer


@contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """Checks the files of a tokenizer, then turns errors of the libraries into one line.

    Raises:
        CheckpointError: a file is invalid.
    """
    if (path := folder / "tokenizer.json").is_file():
        values = read_object(path)
        file_schemas.check(values, file_schemas.TOKENIZER, str(path))
        if "model" not in values:
            raise CheckpointError(f"{path} has no model: it is not a tokenizer; download it again")
        _check_bos_eos(folder, values)
    check_side_files(folder)
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise _unusable(folder, error) from error
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself, and nothing below it
        if type(error) is not Exception:
            raise
        raise _unusable(folder, error) from error


def _check_bos_eos(folder: Path, tokenizer: Mapping[str, Any]) -> None:
    """Checks that tokenizer.json has the bos and eos token; else they would be added with an untrained embedding.

    Raises:
        CheckpointError: one is missing.
    """
    settings = read_object(path) if (path := folder / "tokenizer_config.json").is_file() else {}
    vocab = tokenizer["model"].get("vocab")
    known = set(vocab) if isinstance(vocab, dict) else set()
    if isinstance(vocab, list):  # sentencepiece: pairs of piece and score
        known = {entry[0] for entry in vocab if isinstance(entry, list) and entry}
    added = [*(tokenizer.get("added_tokens") or ()), *(settings.get("added_tokens_decoder") or {}).values()]
    known |= {token["content"] for token in added}
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        text = token["content"] if isinstance(token, dict) else token
        if text and text not in known:
            raise CheckpointError(
                f"{path}: {key} is {shown(text)}, which tokenizer.json does not have: the files belong to different "
                "checkpoints; download them again"
            )


def _unusable(folder: Path, error: Exception) -> CheckpointError:
    reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("Exception: ").split())
    return CheckpointError(f"the tokenizer of {folder} cannot be loaded ({reason}); download its files again")


def _declared_class(folder: Path) -> str:
    file = folder / "tokenizer_config.json"
    return read_object(file).get("tokenizer_class") or "" if file.is_file() else ""


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, family: Family, vocab_size: int, name: str, config: Mapping[str, Any]
) -> None:
    """Checks that the tokenizer has every token the family needs, and that every id has an embedding.

    Args:
        tokenizer: of the checkpoint.
        family: of the checkpoint.
        vocab_size: rows of the embedding table.
        name: the checkpoint, for the message.
        config: its config.json; the placeholder ids in it must be those of the tokenizer.

    Raises:
        CheckpointError: naming the tokens.
    """
    vocabulary = tokenizer.get_vocab()
    for key, token in _PLACEHOLDERS.items():
        if token in family.required_tokens and config.get(key) != vocabulary.get(token):
            raise CheckpointError(
                f"{name}: {key} of config.json is {config.get(key)}, {token} of the tokenizer {vocabulary.get(token)}; "
                "the files belong to different checkpoints; download the folder again"
            )
    if missing := [token for token in family.required_tokens if token not in vocabulary]:
        raise CheckpointError(
            f"the tokenizer of {name} does not know {', '.join(missing)}, which {family.title} needs: the tokenizer "
            "files belong to another model"
        )
    if max(vocabulary.values()) >= vocab_size:
        token = max(vocabulary, key=lambda name: vocabulary[name])
        raise CheckpointError(
            f"{token!r} has id {vocabulary[token]} in the tokenizer of {name}, but the model has {vocab_size} "
            "embeddings: the tokenizer files belong to another model"
        )
