"""A model class for lmms-eval, so that its public benchmarks score a finetuned model with their own code.

Installed beside lmms-eval, the package registers it: ``lmms-eval --model minicpmv_finetune --model_args
pretrained=output/output_lora --tasks mme``. Prompts are those of training and of ``python -m finetune evaluate``.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm.auto import tqdm

from finetune.chat.messages import read_messages
from finetune.chat.pipeline import ChatPipeline, ChatPromptOptions, SamplingOptions, read_options
from finetune.models import load_model
from finetune.sample import Sample
from finetune.utils.errors import ArgumentError

manifest = ModelManifest("minicpmv_finetune", chat_class_path=f"{__name__}.FinetunedModel")
"""The entry that lmms-eval finds through the entry point group ``lmms_eval.models``."""

# Generation settings of tasks; others belong to other models and are named in an error.
_IGNORED = ("until", "use_cache", "image_aspect_ratio", "modality")


# Batches whose prompts are sorted by length together.
_SORTED_BATCHES = 16


class FinetunedModel(lmms):
    """A checkpoint or adapter of this toolkit behind the interface of lmms-eval's chat models.

    Args:
        pretrained: checkpoint folder, hub id, or adapter, which names its base.
        device: auto (the GPU of this process where there is one), cpu, cuda, ...
        dtype: auto (the file's), bfloat16, float16, float32.
        batch_size: prompts per batch.
        options: prompt options of ``model.chat``, such as max_slice_nums, enable_thinking or downsample_mode.

    Raises:
        ArgumentError: an option that does not exist.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        options = {name: value for name, value in options.items() if name != "max_batch_size"}
        self._prompting, _ = read_options(options)
        if not str(batch_size or 1).isdecimal():
            raise ArgumentError(f"batch_size {batch_size}: give a number")
        self.batch_size = int(batch_size or 1)
        self.device = _device(device)
        model = load_model(pretrained, dtype=dtype, device_map={"": self.device}).eval()
        self.pipeline = ChatPipeline(model)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not available: tasks that score given answers instead of generating them.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("minicpmv_finetune generates answers; tasks of output_type loglikelihood are not supported")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not available: tasks whose next question depends on the answer.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError("minicpmv_finetune: tasks of output_type generate_until_multi_round are not supported")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests, generated in batches of equal settings, long prompts first."""
        groups: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[json.dumps(request.args[2], sort_keys=True, default=str)].append(place)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as progress:
            for places in groups.values():
                settings = requests[places[0]].args[2]
                for batch, prompts in self._batches(requests, places):
                    texts = self.pipeline.answer(prompts, self._prompting, sampling_options(settings))
                    for place, text in zip(batch, texts, strict=True):
                        answers[place] = cut_at_stops(text, settings.get("until"))
                        self.cache_hook.add_partial(
                            "generate_until", (requests[place].args[0], settings), answers[place]
                        )
                    progress.update(len(batch))
        return answers

    def _batches(self, requests: Sequence[Any], places: Sequence[int]) -> Iterator[tuple[list[int], list[Sample]]]:
        """Places and prompts, the longest first among as many as are held in memory; each prompt is made once."""
        encoder = self.pipeline.encoder(self._prompting)
        for held in _pieces(places, self.batch_size * _SORTED_BATCHES):
            prompts = {place: self.prompt(requests[place]) for place in held}
            order = list(prompts)
            if self.batch_size > 1:
                length = {place: encoder.measure(prompts[place], generate=True).tokens for place in order}
                order.sort(key=lambda place: -length[place])
            for batch in _pieces(order, self.batch_size):
                yield list(batch), [prompts[place] for place in batch]

    def prompt(self, request: Any) -> Sample:
        """The conversation of a request, ``(text, doc_to_messages, settings, document, task, split)``."""
        _, doc_to_messages, _, document, task, split = request.args
        return to_sample(doc_to_messages(self.task_dict[task][split][document]))

    @property
    def prompting(self) -> ChatPromptOptions:
        """The options of its prompts."""
        return self._prompting


def _pieces(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))


def to_sample(messages: Sequence[Mapping[str, Any]]) -> Sample:
    """Turns of lmms-eval as a Sample; images, videos and audio stay where they are in the text.

    Raises:
        DataError: media that are neither a file nor in memory.
    """
    return read_messages([{**turn, "content": [_part(part) for part in turn["content"]]} for turn in messages])


def _part(part: Mapping[str, Any]) -> Any:
    kind = part["type"]
    if kind == "text":
        return part["text"]
    value = part["url"]
    if kind == "image":
        return {"type": "image", "image": _image(value)}
    if kind == "audio" and isinstance(value, Mapping):  # a decoded clip of a datasets column
        value = _mono_16k(np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"]))
    return {"type": kind, kind: Path(value) if isinstance(value, str) else value}


def _image(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("data:"):
        return Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2])))
    return Path(value) if isinstance(value, str) else value


def _mono_16k(samples: np.ndarray, rate: int) -> np.ndarray:
    if samples.ndim > 1:
        samples = samples.mean(axis=int(samples.shape[0] > samples.shape[-1]))
    if rate != 16000:
        raise ArgumentError(f"audio of {rate} Hz: resample it to 16000 Hz in the task")
    return samples


def sampling_options(settings: Mapping[str, Any]) -> SamplingOptions:
    """Settings of a task as sampling options: greedy unless it asks for a temperature or for sampling.

    Raises:
        ArgumentError: a setting that generation here does not have.
    """
    known = {name: value for name, value in settings.items() if name not in _IGNORED and value is not None}
    drawn = bool(known.pop("do_sample", known.get("temperature", 0) or 0))
    if not drawn:
        known = {name: value for name, value in known.items() if name not in ("temperature", "top_p", "top_k")}
    _, options = read_options({"max_new_tokens": 1024, **known, "sampling": drawn})
    return options


def cut_at_stops(text: str, stops: str | Sequence[str] | None) -> str:
    """The text up to the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.partition(stop)[0] if stop else text
    return text.strip()


def _device(asked: str | None) -> str:
    import torch

    if asked not in (None, "auto", "cuda"):
        return str(asked)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
