"""A base model with named LoRA adapters, at most one of which is active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from finetune.chat.minicpmv_chat import best_device
from finetune.chat.pipeline import ChatPipeline, ChatPromptOptions, SamplingOptions
from finetune.checkpoints.base_checkpoint import resolve_base
from finetune.model_folders.checkpoint_folder import is_adapter, resolve_folder
from finetune.models import base_of, load_model
from finetune.models.adapters import put_adapter
from finetune.sample import Sample
from finetune.utils.errors import ArgumentError
from finetune.utils.paths import expand

OFF = "off"


class ChatSession:
    """A loaded base model, and adapters that are switched by name.

    Args:
        model: folder or hub id of a full checkpoint, or of an adapter, which then is the first; None for the base of
            the first adapter.
        adapters: FOLDER or NAME=FOLDER; the name defaults to that of the folder.
        device: "cuda", "mps", "cpu"; None for the best available one.
        dtype: of the weights; "auto" is the file's.
        downsample_mode: for the base and all adapters; None for the mode that each was trained with.
        use_image_id: whether images are numbered, in the same way.

    Attributes:
        adapters: folder by name.
        active: name of the active adapter, or OFF.
        checkpoints: by adapter, the base with downsample_mode and image ids of that adapter; with its own as OFF.

    Raises:
        ArgumentError: neither model nor adapter is given, or two adapters have one name.
        CheckpointError: a folder cannot be loaded, or an adapter belongs to another model.
    """

    def __init__(
        self,
        model: str | None = None,
        adapters: Sequence[str] = (),
        *,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        downsample_mode: str | None = None,
        use_image_id: bool | None = None,
    ) -> None:
        if model is not None and is_adapter(expand(model)):
            model, adapters = None, (model, *adapters)
        self.adapters = _named(adapters)
        if model is None and not adapters:
            raise ArgumentError("no model: give --model, or --adapter, whose adapter_config.json names its base")
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device or best_device()}}
        folders = {name: resolve_folder(folder) for name, folder in self.adapters.items()}
        base = str(model or base_of(next(iter(folders.values()))))
        self.checkpoints = {
            name: resolve_base(base, downsample_mode, use_image_id=use_image_id, trained=path)
            for name, path in [*folders.items(), (OFF, None)]
        }
        own = self.checkpoints[OFF]
        loaded = load_model(base, downsample_mode=own.downsample_mode, **options)
        for name, folder in folders.items():
            loaded = put_adapter(loaded, folder, name)
        self.model: PreTrainedModel | PeftModel = loaded
        self.model.eval()
        self.active = next(iter(self.adapters), OFF)
        self.pipeline = ChatPipeline(self.model)
        self._lock = Lock()

    def choose(self, name: str) -> None:
        """Activates an adapter, or none (OFF).

        Raises:
            ArgumentError: there is no such adapter.
        """
        if name != OFF and name not in self.adapters:
            raise ArgumentError(f"no adapter {name!r}; there are {', '.join([*self.adapters, OFF])}")
        self.active = name

    def stream(
        self, sample: Sample, prompting: ChatPromptOptions, decoding: SamplingOptions, name: str | None = None
    ) -> Iterator[str]:
        """The answer as a stream of text chunks, of the active adapter or the one called ``name``.

        Raises:
            DataError: a conversation or an image that cannot be used.
            ArgumentError: settings that do not fit.
        """
        name = self.active if name is None else name
        with self._activated(name):
            yield from self.pipeline.stream(sample, self._as_trained(name, prompting), decoding)

    def check(self, prompting: ChatPromptOptions) -> None:
        """Refuses settings that do not fit the active adapter.

        Raises:
            ArgumentError: they do not fit.
        """
        self.pipeline.encoder(self._as_trained(self.active, prompting))

    def _as_trained(self, name: str, prompting: ChatPromptOptions) -> ChatPromptOptions:
        """The prompt options, with downsample_mode and image ids of an adapter where they are not given."""
        mode, ids = self.checkpoints[name].mode, self.checkpoints[name].image_ids
        if prompting.downsample_mode is None and mode is not None:
            prompting = replace(prompting, downsample_mode=mode.name)
        if prompting.use_image_id is None and ids is not None:
            prompting = replace(prompting, use_image_id=ids.used)
        return prompting

    @contextmanager
    def _activated(self, name: str) -> Iterator[None]:
        # The model has one active adapter: it must not change while an answer is generated.
        with self._lock:
            if not isinstance(self.model, PeftModel):
                yield
            elif name == OFF:
                with self.model.disable_adapter():
                    yield
            else:
                self.model.set_adapter(name)
                yield


def _named(adapters: Sequence[str]) -> dict[str, str]:
    """Folders by name."""
    found: dict[str, str] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        if not equals or Path(given).exists():
            # peft allows no dots in adapter names.
            name, folder = expand(given).resolve().name.replace(".", "_"), given
        if name in found or name == OFF:
            raise ArgumentError(f"--adapter {given}: the name {name!r} is taken; give NAME={folder}")
        found[name] = folder
    return found
