"""Reads the tensors of a base with an adapter merged in (LoRA, modules_to_save, token rows), one layer at a time.

Nothing is written here. Model and adapter are built on the meta device; peft maps the tensors of the adapter file to
layers and computes the merge of every layer, in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import AutoConfig, PreTrainedModel

from finetune.checkpoints.safetensors_io import StoredTensor, read_tensor, stored_in
from finetune.model_folders.checkpoint_folder import weight_files
from finetune.model_folders.weight_headers import check_not_truncated
from finetune.models.adapters import (
    ADAPTER_PREFIX,
    ADAPTER_WEIGHTS,
    base_model_name,
    check_adapter,
    check_complete,
    check_fit,
    lora_config_of,
    peft_errors,
    stored_shapes,
    trained_beside,
)
from finetune.models.duplex_rows import add_duplex_rows, grow
from finetune.models.loading import MODEL_CLASSES
from finetune.models.strict_loading import check_folder
from finetune.runtime.imports import optional_libraries_hidden
from finetune.templates.duplex_fc import LAST_ID
from finetune.utils.errors import CheckpointError

_NAME = "default"
_SAVED = f".modules_to_save.{_NAME}."
_ROWS = ".token_adapter."


class TensorSource(Protocol):
    """The tensors of a model, read one at a time.

    Attributes:
        stored: every tensor by name; for a changed one the original, with its dtype and shape.
        changed: names of the tensors whose values differ from the stored ones.
        untied: whether embeddings and output layer, tied by config.json, have become two tensors.
        replaced_in_full: names of the tensors that an adapter has in full (modules trained in full, biases).
        overridden: those of ``replaced_in_full`` that an earlier adapter had too, and whose values are lost.
    """

    stored: Mapping[str, StoredTensor]
    changed: set[str]
    untied: bool
    replaced_in_full: set[str]
    overridden: set[str]

    def read(self, name: str) -> torch.Tensor:
        """One tensor; a changed one is float32, whatever is stored."""
        ...


class BaseTensors:
    """The tensors of a model folder, unchanged but for the rows of the duplex prompt o45_fc on request."""

    def __init__(self, folder: Path, *, duplex_rows: bool = False) -> None:
        check_folder(folder)
        for path in (files := weight_files(folder)):
            check_not_truncated(path)
        self._in_files = stored_in(files)
        grows = {name: _with_new_rows(each) for name, each in self._in_files.items() if duplex_rows and _is_end(name)}
        self.stored: Mapping[str, StoredTensor] = {**self._in_files, **grows}
        self.changed: set[str] = set(grows)
        self.untied = False
        self.replaced_in_full: set[str] = set()
        self.overridden: set[str] = set()

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored, or with the new rows."""
        tensor = read_tensor(self._in_files[name])
        return grow(tensor) if name in self.changed else tensor


class MergedTensors:
    """The tensors of ``below`` with an adapter merged into them.

    Args:
        below: the base, without or with other merged adapters.
        model: the base model on the meta device; it is modified.
        folder: folder of the adapter.
        device: device that computes the merge.
        keep: whether the LoRA of a module (by its name in the model) stays an adapter instead of being merged.

    Raises:
        CheckpointError: the adapter cannot be merged, does not match the base, or is not complete.
    """

    def __init__(
        self,
        below: TensorSource,
        model: PreTrainedModel,
        folder: Path,
        *,
        device: str = "cpu",
        keep: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._below, self._folder, self._device = below, folder, device
        self._file = folder / ADAPTER_WEIGHTS
        ties = tied_names(model)
        self._beside = trained_beside(folder)
        self.config = lora_config_of(folder, self._beside)
        _check_kind(folder, self.config)
        self._model = self._meta_adapter(model)
        self._in_file = stored_in([self._file])
        present = set(self._in_file) | set(self._beside)
        self._keys = {name: key for name, key in _names(self._model).items() if key in present}
        self._layers, self.kept = self._lora_layers(keep)
        inside = tuple(f"{path}." for path, module in self._model.named_modules() if isinstance(module, LoraLayer))
        outside = {name: key for name, key in self._keys.items() if not name.startswith(inside)}
        self._rows = {_row_owner(name): key for name, key in outside.items() if _ROWS in name}
        self._replaced = {_base_name(name): key for name, key in outside.items() if _ROWS not in name}
        in_full = {_row_owner(name) for name in self._keys if ".lora_" not in name}
        self.replaced_in_full = below.replaced_in_full | in_full
        self.overridden = below.replaced_in_full & in_full
        self._ready: dict[str, torch.Tensor] = {}
        split = [names for names in ties if len({self._change(name) for name in names}) > 1]
        self.untied = below.untied or bool(split)
        self._tied = self._absent(split)
        self.stored: Mapping[str, StoredTensor] = {
            **below.stored,
            **{name: below.stored[where] for name, where in self._tied.items()},
        }
        self.changed = below.changed | set(self._layers) | set(self._replaced) | set(self._rows) | set(self._tied)
        self._check_stored()

    def _lora_layers(
        self, keep: Callable[[str], bool]
    ) -> tuple[dict[str, tuple[str, LoraLayer]], dict[str, LoraLayer]]:
        """The layers to merge, with their paths in the meta model, by tensor; and those to keep, by module."""
        merged: dict[str, tuple[str, LoraLayer]] = {}
        kept: dict[str, LoraLayer] = {}
        for path, module in self._model.named_modules():
            if isinstance(module, LoraLayer) and not path.endswith(".base_layer") and ".original_module." not in path:
                module_name = _base_name(path)
                if keep(module_name) and not isinstance(module, ParamWrapper):
                    kept[module_name] = module
                else:
                    tensors = module.get_base_layer().state_dict()
                    merged |= {f"{module_name}.{name}": (path, module) for name in tensors}
        return merged, kept

    def _check_stored(self) -> None:
        """Refuses an adapter of tensors that the base does not store.

        Raises:
            CheckpointError: with the first of them.
        """
        if lost := sorted(self.changed - set(self.stored)):
            unfused = any(re.search(r"\.experts\.\d+\.", name) for name in self.stored)
            remedy = "; they store every expert separately: load_model(BASE).save_pretrained(OUT) stores fused experts"
            raise CheckpointError(
                f"{self._folder} changes {lost[0]}, which the weight files of the base do not have"
                f"{remedy if unfused else ''}"
            )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, merged where the adapter changes it.

        Raises:
            CheckpointError: an adapter with values that are not finite, or that peft cannot merge.
        """
        if name in self._ready:
            return self._ready.pop(name)
        if name in self._layers:
            self._ready |= self._merge(*self._layers[name])
            return self._ready.pop(name)
        if name in self._replaced:
            return self._from_adapter(self._replaced[name])
        if name in self._rows:
            indices: Any = self.config.trainable_token_indices
            rows = indices[name.split(".")[-2]]
            table, trained = self._read_below(name), self._from_adapter(self._rows[name])
            return table.index_copy(0, torch.tensor(rows), trained.to(table.dtype))
        return self._read_below(name)

    def adapter_tensor(self, module: str, part: str) -> torch.Tensor:
        """A tensor of a module that stays an adapter: "lora_A.weight" or "lora_B.weight"."""
        return self._from_adapter(f"{ADAPTER_PREFIX}{module}.{part}")

    def _meta_adapter(self, model: PreTrainedModel) -> PeftModel:
        """The model with the adapter on the meta device, after checks of the adapter's files."""
        settings = check_adapter(self._folder)
        shapes = stored_shapes(self._file) | {name: tuple(tensor.shape) for name, tensor in self._beside.items()}
        check_fit(model, self._folder, settings, shapes)
        with peft_errors(self._folder), optional_libraries_hidden():  # nothing is merged into a base in 4 bit
            adapted = PeftModel(model, self.config, adapter_name=_NAME, low_cpu_mem_usage=True)
        stored = set(shapes)
        if self._beside:  # the file beside the adapter has only the trained tensors of a module
            stored |= {key for key in _described(adapted) if ".lora_" not in key}
        check_complete(adapted, self._file, stored, _NAME)
        return adapted

    def _change(self, name: str) -> str | None:
        """An identifier of the change that the adapter makes to a tensor; None for none."""
        return self._layers[name][0] if name in self._layers else self._replaced.get(name, self._rows.get(name))

    def _absent(self, split: list[list[str]]) -> dict[str, str]:
        """Tied tensors that the base stores only under another name -> that name."""
        result = {}
        for names in split:
            where = next((name for name in names if name in self._below.stored), None)
            if where is not None:
                result |= {name: where for name in names if name not in self._below.stored}
        return result

    def _merge(self, path: str, layer: LoraLayer) -> dict[str, torch.Tensor]:
        """The merged tensors of one layer, computed by peft."""
        module = self._model.get_submodule(path)
        tensors = {}
        for name in module.state_dict():
            key = self._keys.get(f"{path}.{name}")
            tensors[name] = self._from_adapter(key) if key else self._read_below(_base_name(f"{path}.{name}"))
        module.to_empty(device=self._device)
        module.load_state_dict(tensors)
        del tensors
        # Adapters of several parameters of a module are nested.
        wrappers = [each for each in module.modules() if isinstance(each, LoraLayer)]
        try:
            for wrapper in wrappers:
                wrapper.merge(safe_merge=False)
        except RuntimeError as error:
            raise CheckpointError(f"{self._folder}: {_base_name(path)} cannot be merged: {error}") from error
        module_name = _base_name(path)
        merged = {f"{module_name}.{name}": tensor for name, tensor in layer.get_base_layer().state_dict().items()}
        for wrapper in wrappers:
            wrapper.merged_adapters.clear()
        module.to(device="meta")
        for name, tensor in merged.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{self._folder}: {name} would not be finite; the adapter is damaged")
        return merged

    def _read_below(self, name: str) -> torch.Tensor:
        return self._below.read(self._tied.get(name, name))

    def _from_adapter(self, key: str) -> torch.Tensor:
        return self._beside[key] if key in self._beside else read_tensor(self._in_file[key])


def empty_model(folder: Path, *, duplex_rows: bool = False) -> PreTrainedModel:
    """The model of config.json on the meta device, with the rows of the duplex prompt o45_fc on request."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = MODEL_CLASSES[config.model_type](config)
        if duplex_rows:
            add_duplex_rows(model)
    return model


def _is_end(name: str) -> bool:
    """Whether a tensor is the embeddings or the output layer."""
    return name.endswith((".embed_tokens.weight", ".lm_head.weight"))


def _with_new_rows(stored: StoredTensor) -> StoredTensor:
    """The entry of a tensor that gets the new rows."""
    rows, *rest = stored.shape
    return replace(stored, shape=[LAST_ID, *rest], size=stored.size // rows * LAST_ID)


def _row_owner(name: str) -> str:
    """The tensor in the base model that a tensor of the meta model replaces, as a whole or some rows of it."""
    module, rows, _ = name.partition(_ROWS)
    return f"{_base_name(module)}.weight" if rows else _base_name(name)


def adapter_names(model: PreTrainedModel, folder: Path, beside: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of a LoRA adapter's tensors: in training -> in its file.

    Args:
        model: the base model on the meta device; it is modified.
        folder: folder with adapter_config.json.
        beside: as for ``lora_config_of``.
    """
    config = lora_config_of(folder, dict(beside))
    return _names(PeftModel(model, config, adapter_name=_NAME, low_cpu_mem_usage=True))


def _names(model: PeftModel) -> dict[str, str]:
    """Name of a tensor in the meta model -> its name in the adapter's files; tied ones have the same."""
    owners: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owners.setdefault(id(tensor), []).append(name)
    return {name: key for key, tensor in _described(model).items() for name in owners[id(tensor)]}


def _described(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter tensors of the meta model, by their names in an adapter file."""
    return get_peft_model_state_dict(
        model, state_dict=model.state_dict(keep_vars=True), adapter_name=_NAME, save_embedding_layers=False
    )


def tied_names(model: PreTrainedModel) -> list[list[str]]:
    """Groups of names of tied tensors."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _base_name(path: str) -> str:
    """The name in the base model of the module or tensor ``path`` of the meta model."""
    return base_model_name(path.removeprefix(ADAPTER_PREFIX)).replace(_SAVED, ".")


def _check_kind(folder: Path, config: LoraConfig) -> None:
    """Refuses adapters that cannot be merged.

    Raises:
        CheckpointError: with the reason.
    """
    if config.layer_replication:
        raise CheckpointError(
            f"{folder} repeats layers (layer_replication): merged, the copies would need weights of their own and a "
            "config.json with more layers, which no official code reads. Use it as an adapter"
        )
