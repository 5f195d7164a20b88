"""Tokenizers of published folders and of adapters, without running the code that the folders name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.families.common import IMAGE_PAD, VIDEO_PAD
from finetune.families.family import Family
from finetune.model_folders import file_schemas
from finetune.model_folders.checkpoint_folder import check_side_files
from finetune.models.byte_bpe_tokenizer import from_vocabulary
from finetune.models.sentencepiece_tokenizer import from_sentencepiece
from finetune.utils.errors import CheckpointError, UserError
from finetune.utils.json_objects import read_object, shown

_PLACEHOLDERS = {"image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD}
# Any of these is a tokenizer.
_FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


class MiniCPMVTokenizerFast(PreTrainedTokenizerFast):
    """The class that published tokenizer_config.json files name; it adds nothing to what the folder's files say."""

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
    """The same under the name that the o models use."""


class MiniCPMVTokenizer(MiniCPMVTokenizerFast):
    """The same under the name that V-2.0 uses."""


_CLASSES = {chosen.__name__: chosen for chosen in (MiniCPMVTokenizerFast, MiniCPMOTokenizerFast, MiniCPMVTokenizer)}


class _TokenizerOnly(PretrainedConfig):
    """Carries the registration below.

    Registered for MiniCPMVConfig instead, ``trust_remote_code=True`` would ask for the folder's own code again.
    """

    model_type: ClassVar[str] = "minicpmv_tokenizer_only"


class _OmniTokenizerOnly(_TokenizerOnly):
    """A configuration carries two classes at most."""

    model_type: ClassVar[str] = "minicpmo_tokenizer_only"


def register() -> None:
    """Makes AutoTokenizer know the classes by name, which serves model and adapter folders alike."""
    AutoTokenizer.register(
        _TokenizerOnly, slow_tokenizer_class=MiniCPMVTokenizer, fast_tokenizer_class=MiniCPMVTokenizerFast
    )
    AutoTokenizer.register(_OmniTokenizerOnly, fast_tokenizer_class=MiniCPMOTokenizerFast)


def load_tokenizer(folder: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter folder, or of a hub id.

    Args:
        folder: local folder with tokenizer.json, vocab.json and merges.txt, or tokenizer.model; or a hub id.
        **kwargs: handed on to ``from_pretrained`` (revision, cache_dir, ...).

    Raises:
        CheckpointError: the folder has no tokenizer files, or they contradict each other.
    """
    path = Path(folder)
    if path.is_dir() and not any(all((path / name).is_file() for name in form) for form in _FORMS):
        forms = ", ".join(" with ".join(form) for form in _FORMS)
        raise CheckpointError(f"{path} has no tokenizer: it needs one of {forms}")
    with tokenizer_errors(path):
        named = _declared_class(path) if path.is_dir() else ""
        return _CLASSES.get(named, MiniCPMVTokenizerFast).from_pretrained(folder, **kwargs)


@contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """The files of a tokenizer are looked at before, and what the libraries say of them then is one line.

    Raises:
        CheckpointError: a file is not what it should be.
    """
    if (path := folder / "tokenizer.json").is_file():
        values = read_object(path)
        file_schemas.check(values, file_schemas.TOKENIZER, str(path))
        if "model" not in values:
            raise CheckpointError(f"{path} has no model: it is no tokenizer; download it again")
        _check_ends(folder, values)
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


def _check_ends(folder: Path, tokenizer: Mapping[str, Any]) -> None:
    """A bos or eos that tokenizer.json does not have would be a new token, with an embedding that nobody trained."""
    settings = read_object(path) if (path := folder / "tokenizer_config.json").is_file() else {}
    words = tokenizer["model"].get("vocab")
    known = set(words) if isinstance(words, dict) else set()
    if isinstance(words, list):  # of sentencepiece: words with their scores
        known = {word[0] for word in words if isinstance(word, list) and word}
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
    return CheckpointError(f"the tokenizer of {folder} cannot be made from its files ({reason}); download them again")


def _declared_class(folder: Path) -> str:
    file = folder / "tokenizer_config.json"
    return read_object(file).get("tokenizer_class") or "" if file.is_file() else ""


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, family: Family, vocab_size: int, name: str, config: Mapping[str, Any]
) -> None:
    """Checks that every token the family needs is one id, and that every id has an embedding.

    Args:
        tokenizer: the checkpoint's tokenizer.
        family: the checkpoint's family.
        vocab_size: rows of the embedding table.
        name: the checkpoint, for the message.
        config: its config.json; the ids of placeholders in it must be those of the tokenizer.

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
            f"{token!r} has id {vocabulary[token]} in the tokenizer of {name}, but its network has {vocab_size} "
            "embeddings: the tokenizer files belong to another model"
        )
