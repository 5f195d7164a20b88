"""Strict loading: raises on missing, unexpected, mismatched, non-finite weights, and on quantised ones but 4 bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from finetune.model_folders.checkpoint_folder import INDEX, WEIGHTS, read_config, weight_files
from finetune.model_folders.stored_4bit import check_packed, packed_weights, stored_in_4bit
from finetune.model_folders.weight_headers import check_not_truncated, check_quantisation
from finetune.models.finite_weights import check_finite_model, check_types
from finetune.models.packed_4bit import check_bitsandbytes, check_layers, prepare_4bit
from finetune.utils.errors import CheckpointError, UserError

# Prefixes of the names of tensors that no model reads; copied into full results (``checkpoints.passthrough_tensors``).
PASSTHROUGH_PREFIXES = ("tts.",)


def some(names: Sequence[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_folder(folder: Path) -> None:
    """Checks that a local folder has a configuration and safetensors weights, not quantised or in 4 bit.

    Raises:
        CheckpointError: naming what is missing and what was found.
    """
    check_quantisation(folder)
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder} is not a checkpoint: config.json is missing (found: {found})")
    config = read_config(folder)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        for path in (files := weight_files(folder)):
            check_not_truncated(path)
        packed = check_packed(folder, files) if stored_in_4bit(config) else []
        for path in files:
            check_types(path, (*PASSTHROUGH_PREFIXES, *packed))
        return
    if shards := sorted(path.name for path in folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has {shards[0]}, but neither {WEIGHTS} nor {INDEX}, the index of the shards: an interrupted "
            "download? Run it again"
        )
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} has weights only as {pickled[0]}, which runs code when read; only safetensors are loaded: "
            "convert the file, or download a revision with model.safetensors"
        )
    raise CheckpointError(f"{folder} has config.json but no weights: model*.safetensors is missing")


def check_loaded(name: str, info: dict[str, Any], allow_mismatched: bool) -> None:
    """Checks the loading info of transformers.

    Args:
        name: the checkpoint, for the message.
        info: from ``output_loading_info=True``.
        allow_mismatched: whether tensors of another shape may be initialised anew.

    Raises:
        CheckpointError: listing the tensors that are missing, unexpected or of another shape.
    """
    problems = []
    mismatched = {key: (file, model) for key, file, model in info.get("mismatched_keys") or ()}
    if missing := sorted(set[str](info.get("missing_keys") or ()) - set(mismatched)):
        problems.append(f"{len(missing)} tensors are missing in the file: {some(missing)}")
    if unexpected := sorted(set[str](info.get("unexpected_keys") or ())):
        problems.append(f"{len(unexpected)} tensors in the file are unknown to the model: {some(unexpected)}")
    if mismatched and not allow_mismatched:
        shapes = [f"{key} is {tuple(a)} in the file, {tuple(b)} by config.json" for key, (a, b) in mismatched.items()]
        problems.append(f"{len(shapes)} tensors have another shape: {some(sorted(shapes))}")
    if errors := info.get("error_msgs"):
        problems.append(f"errors while reading: {some(list(errors))}")
    if problems:
        raise CheckpointError(f"{name} does not fit its config.json. {'. '.join(problems)}")


@contextmanager
def model_build_errors(name: str) -> Iterator[None]:
    """Turns errors of building a model from its files into one line.

    Raises:
        CheckpointError: with the reason.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name}: the model cannot be built from its files ({type(error).__name__}: {reason}); download it again"
        ) from error


class StrictLoadingMixin(PreTrainedModel):
    """Makes ``from_pretrained``, also of AutoModel, raise instead of initialising missing weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As in transformers, but from safetensors only, and with the checks of this module.

        Raises:
            CheckpointError: files are missing, or weights and config.json disagree.
        """
        kwargs.setdefault("use_safetensors", True)
        wants_info = kwargs.pop("output_loading_info", False)
        name = str(pretrained_model_name_or_path)
        folder = Path(name, kwargs.get("subfolder") or "")
        checked = pretrained_model_name_or_path is not None and folder.is_dir() and kwargs["use_safetensors"]
        if checked:
            check_folder(folder)
        in_4bit = checked and stored_in_4bit(read_config(folder))
        if in_4bit:
            check_bitsandbytes(name)
        allow_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        with model_build_errors(name):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with names
                **kwargs,
            )
        model, info = loaded
        check_loaded(name, info, allow_mismatched)
        if in_4bit:
            packed = {key for key in packed_weights(weight_files(folder)) if not key.startswith(PASSTHROUGH_PREFIXES)}
            check_layers(model, name, packed)
            prepare_4bit(model, kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto")
        check_finite_model(model, name, weight_files(folder) if checked else [])
        result: Any = (model, info) if wants_info else model
        return result
