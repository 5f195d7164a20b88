"""Strict loading: raises on missing, unexpected, mismatched, quantised or non-finite weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from finetune.families import detect
from finetune.model_folders.checkpoint_folder import CONFIG, INDEX, WEIGHTS, read_config, weight_files
from finetune.models.finite_weights import check_finite_model, check_types
from finetune.utils.errors import CheckpointError, UserError
from finetune.utils.json_objects import read_object

# Prefixes of the names of tensors that no model reads; copied into full results (``checkpoints.passthrough_tensors``).
PASSTHROUGH_PREFIXES = ("tts.",)
# Files of quantisers (GPTQ, AWQ), and suffixes of tensors of quantised layers (those and bitsandbytes).
_QUANTISED_FILES = ("quant_config.json", "quantize_config.json")
_QUANTISED_TENSORS = (".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".nested_absmax", ".SCB")


def some(names: Sequence[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_folder(folder: Path) -> None:
    """Checks that a local folder has a configuration and safetensors weights, not quantised.

    Raises:
        CheckpointError: naming what is missing and what was found.
    """
    check_unquantised(folder)
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder} is not a checkpoint: config.json is missing (found: {found})")
    read_config(folder)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        for path in weight_files(folder):
            check_not_truncated(path)
            check_types(path, PASSTHROUGH_PREFIXES)
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


def check_unquantised(folder: Path) -> None:
    """Checks that the weights of a local folder are not quantised; folders without weights pass.

    Raises:
        CheckpointError: they are; it names the published checkpoint to use instead.
    """
    reason = _quantised(folder)
    if reason is None:
        return
    config = _config_of(folder)
    name = detect(config).hub_id if config else "the unquantised checkpoint"
    raise CheckpointError(
        f"{folder} is quantised ({reason}): such weights can neither be trained nor be merged with an adapter. Use "
        f"{name} instead; --q_lora true loads it in 4 bit"
    )


def _quantised(folder: Path) -> str | None:
    """Why the weights of a folder count as quantised; None if they do not."""
    if _config_of(folder).get("quantization_config"):
        return "config.json has quantization_config"
    for name in _QUANTISED_FILES:
        if (folder / name).is_file():
            return f"it has {name}"
    weights = sorted(folder.glob("*.safetensors"))
    if weights and (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        weight_files(folder)  # raises for an interrupted download, before any file is opened
    if not weights and (packed := sorted(path.name for path in folder.glob("*.gguf"))):
        return f"its weights are {packed[0]}"
    for path in weights:
        check_not_truncated(path)
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name.endswith(_QUANTISED_TENSORS) or ".quant_state." in name:
                    return f"{path.name} has {name}"
    return None


def _config_of(folder: Path) -> dict[str, Any]:
    """config.json; empty if it is missing or invalid, which is reported elsewhere."""
    try:
        return read_object(folder / CONFIG)
    except CheckpointError:
        return {}


def check_not_truncated(path: Path) -> None:
    """Checks the header and length of a safetensors file without reading the weights.

    Raises:
        CheckpointError: it is truncated, or not a safetensors file (a Git LFS pointer, an HTML page).
    """
    try:
        with safe_open(str(path), framework="pt"):
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file ({error}); copy or download "
            "it again"
        ) from error


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
        check_finite_model(model, name, weight_files(folder) if checked else [])
        result: Any = (model, info) if wants_info else model
        return result
