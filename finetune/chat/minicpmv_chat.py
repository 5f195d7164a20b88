"""``MiniCPMVChat`` of OpenBMB's guides: loads a checkpoint or adapter, answers a base64 image with a JSON question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from finetune.chat.media_inputs import from_base64, img2base64
from finetune.chat.messages import read_messages
from finetune.chat.pipeline import ChatPipeline, read_options
from finetune.models import load_model
from finetune.sample import Source
from finetune.utils.errors import ArgumentError, located

__all__ = ["MiniCPMVChat", "best_device", "img2base64"]


class MiniCPMVChat:
    """Chat with a full checkpoint or an adapter.

    Args:
        path: folder of either, or a hub id.
        device: "cuda", "cuda:1", "mps", "cpu"; None for the best available one.
        dtype: of the weights; "auto" is the file's.
        **options: passed to ``load_model`` (base, attn_implementation, revision, ...).

    Raises:
        CheckpointError: the folder cannot be loaded.
    """

    def __init__(
        self, path: str | Path, *, device: str | None = None, dtype: torch.dtype | str = "auto", **options: Any
    ) -> None:
        options.setdefault("device_map", {"": device or best_device()})
        self.model: PreTrainedModel | PeftModel = load_model(path, dtype=dtype, **options).eval()
        self._talker = ChatPipeline(self.model)
        self.tokenizer = self._talker.tokenizer

    def chat(self, inputs: Mapping[str, Any], **options: Any) -> str:
        """The answer to a conversation.

        Args:
            inputs: ``question``, the turns (``role`` and ``content``) as JSON, and ``image``, a base64 image for
                the first user turn; absent, None or "": text only.
            **options: fields of ``ChatPromptOptions`` and ``SamplingOptions``, e.g. sampling=False,
                max_new_tokens=64; and system_prompt.

        Raises:
            DataError: malformed messages, or an image that cannot be decoded.
            ArgumentError: an option that does not exist.
        """
        if "question" not in inputs:
            raise ArgumentError(f"inputs have no 'question' (found {', '.join(map(repr, inputs)) or 'nothing'})")
        encoded = inputs.get("image")
        with located(Source("chat", 0)):
            image = from_base64(encoded) if encoded else None
        sample = read_messages(inputs["question"], image, system_prompt=options.pop("system_prompt", None))
        prompting, decoding = read_options(options)
        return self._talker.answer([sample], prompting, decoding)[0]


def best_device() -> str:
    """The GPU (CUDA, then Apple's) where there is one, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
