"""Chat pipeline: batched generation and token streaming with a loaded model and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from torch import nn
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from finetune.chat.detokenizer import IncrementalDetokenizer
from finetune.encoding.encoder import Encoder, PromptOptions
from finetune.evaluation.batched_generation import answer_text, evaluating, generate_ids, prompt_batch
from finetune.families import by_name, detect
from finetune.families.settings import DOWNSAMPLE_MODE
from finetune.media.video_sampling import VideoOptions
from finetune.model_folders.checkpoint_folder import read_settings
from finetune.model_folders.downsample_mode import decide, with_mode
from finetune.model_folders.image_ids import recorded, with_image_ids
from finetune.sample import Message, Sample, Source, Text
from finetune.tokenizers.tokenization import load_tokenizer
from finetune.utils.errors import ArgumentError

# With thinking enabled the prompt may end with this tag; it is then part of the answer.
_OPEN_THOUGHT = "<think>\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPromptOptions:
    """Prompt options; None keeps the checkpoint's value.

    Attributes:
        max_slice_nums: maximum number of slices per image.
        use_image_id: whether images are numbered; None for what the adapter was trained with, else the checkpoint's.
        enable_thinking: whether the model is asked to think before it answers.
        max_inp_length: longest prompt in tokens; a longer one is refused.
        use_tts_template: MiniCPM-o: whether to use the prompt for spoken answers; always used with audio.
        chunk_input: MiniCPM-o: whether every second of audio has its own placeholders.
        downsample_mode: of 4.6 and later, "16x" or "4x"; None for the model's.
        video: how video frames are sampled.
    """

    max_slice_nums: int | None = None
    use_image_id: bool | None = None
    enable_thinking: bool | None = None
    max_inp_length: int | None = None
    use_tts_template: bool | None = None
    chunk_input: bool | None = None
    downsample_mode: str | None = None
    video: VideoOptions = VideoOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Sampling options of generation.

    Attributes:
        sampling: whether to sample; False is greedy decoding or beam search.
        temperature: above 0; used only with sampling, as are top_p and top_k.
        top_p: cumulative probability of the tokens sampled from.
        top_k: number of tokens sampled from.
        repetition_penalty: above 1 penalises tokens that the answer already has; None for 1.05 with sampling, else no
            penalty.
        num_beams: beams of beam search.
        max_new_tokens: maximum length of an answer in tokens.
        min_new_tokens: minimum length of an answer in tokens.
    """

    sampling: bool = True
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 100
    repetition_penalty: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 2048
    min_new_tokens: int = 0

    def options(self, prompt_length: int) -> dict[str, Any]:
        """Keyword arguments for ``generate``; they override all of the checkpoint's generation_config.json."""
        chosen: dict[str, Any] = {"do_sample": self.sampling, "num_beams": self.num_beams, "repetition_penalty": 1.0}
        if self.sampling:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.min_new_tokens:
            chosen["min_new_tokens"] = self.min_new_tokens
        penalty = self.repetition_penalty or (1.05 if self.sampling else 1.0)
        if penalty != 1.0:
            # The penalty of ``generate`` itself would also count the tokens of the prompt.
            processor = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=prompt_length)
            chosen["logits_processor"] = LogitsProcessorList([processor])
        return {**chosen, "max_new_tokens": self.max_new_tokens}


# Arguments of published calls that have no effect here; callers that do not use them pass None.
_WITHOUT_USE = ("processor", "vision_hidden_states", "streamer")
# Arguments that request speech output, which the model here does not include.
_SPEECH = ("generate_audio", "output_audio_path", "return_spk_embed", "return_dict")
_PROMPTING = {field.name for field in fields(ChatPromptOptions)}
_DECODING = {field.name for field in fields(SamplingOptions)}


def read_options(options: Mapping[str, Any]) -> tuple[ChatPromptOptions, SamplingOptions]:
    """Splits keyword arguments into the two; those that are None keep their default.

    Raises:
        ArgumentError: there is no such option.
    """
    options = dict(options)
    if (drawn := options.pop("do_sample", None)) is not None:
        options.setdefault("sampling", drawn)
    for name in _SPEECH:
        if options.pop(name, None):
            raise ArgumentError(f"{name}: answers are text, speech output needs the published code; remove {name}")
    if options.pop("temporal_ids", None):
        raise ArgumentError(
            "temporal_ids: give the video itself in place of its frames, Path(...) or {'type': 'video', 'video': ...}; "
            "frames are then sampled and grouped as the checkpoint requires"
        )
    for name, value in options.items():
        if name not in _PROMPTING | _DECODING and (name not in _WITHOUT_USE or value is not None):
            known = ", ".join(sorted(_PROMPTING | _DECODING))
            raise ArgumentError(f"chat has no option {name}={value!r}; there are {known}")
    given = {name: value for name, value in options.items() if value is not None}
    decoding = SamplingOptions(**{name: value for name, value in given.items() if name in _DECODING})
    return ChatPromptOptions(**{name: value for name, value in given.items() if name in _PROMPTING}), decoding


class ChatPipeline:
    """A model and its tokenizer for generation.

    Args:
        model: the model, or a PeftModel around it.
        tokenizer: the checkpoint's; None for the one in the folder that the model was loaded from.

    Raises:
        CheckpointError: there is no tokenizer.
        UnknownFamilyError: the model is not of a supported family.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model
        config, folder = _origin(model)
        self.family = detect(config)
        self.tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
        # Processor settings are in files beside config.json.
        whole = (Path(folder) / "config.json").is_file()
        self._settings = read_settings(Path(folder), config) if whole else config

    def encoder(self, prompting: ChatPromptOptions) -> Encoder:
        """The encoder for these prompt options.

        Raises:
            ArgumentError: the family does not have the thinking mode or downsample_mode that is requested.
        """
        network: Any = self.model.config
        wish = prompting.downsample_mode or getattr(network, DOWNSAMPLE_MODE, None)
        mode = decide(self.family, self._settings, None, wish, environment={})
        used = _trained_ids(self.model) if prompting.use_image_id is None else prompting.use_image_id
        settings = with_image_ids(with_mode(self._settings, mode), self.family, used)
        config = json.dumps(settings, sort_keys=True, default=str)
        encoder = _encoder(self.family.name, self.tokenizer, config, prompting)
        if prompting.enable_thinking and not _has_thinking_mode(self.family.name, self.tokenizer, config):
            raise ArgumentError(f"enable_thinking: {self.family.title} has no thinking mode; remove it")
        return encoder

    def answer(self, samples: Sequence[Sample], prompting: ChatPromptOptions, decoding: SamplingOptions) -> list[str]:
        """Answers to conversations that end with a user turn, in one left-padded batch.

        Raises:
            DataError: a conversation or an image that cannot be used.
            ArgumentError: settings that do not fit.
        """
        encoder = self.encoder(prompting)
        batch, opening = self._batch(encoder, samples)
        rows = generate_ids(self.model, encoder, batch, **decoding.options(batch["input_ids"].shape[1]))
        return [opening + answer_text(self.tokenizer, row, encoder.stop_ids) for row in rows]

    def stream(self, sample: Sample, prompting: ChatPromptOptions, decoding: SamplingOptions) -> Iterator[str]:
        """The answer as a stream of text chunks. Closing the iterator stops the generation.

        Raises:
            DataError: a conversation or an image that cannot be used; raised by the call, not with the first chunk.
            ArgumentError: settings that do not fit.
        """
        if decoding.num_beams > 1:
            raise ArgumentError(f"stream=True: beam search (num_beams={decoding.num_beams}) cannot be streamed")
        encoder = self.encoder(prompting)
        batch, opening = self._batch(encoder, [sample])
        return self._stream(encoder, batch, opening, decoding)

    def _stream(
        self, encoder: Encoder, batch: dict[str, torch.Tensor], opening: str, decoding: SamplingOptions
    ) -> Iterator[str]:
        tokens: SimpleQueue[int | None] = SimpleQueue()
        stop = Event()
        more = {"streamer": _TokenStreamer(tokens), "stopping_criteria": StoppingCriteriaList([_StopRequested(stop)])}
        detokenizer = IncrementalDetokenizer(self.tokenizer, encoder.stop_ids)
        options = decoding.options(batch["input_ids"].shape[1]) | more
        with evaluating(self.model), ThreadPoolExecutor(1) as pool:
            future = pool.submit(generate_ids, self.model, encoder, batch, **options)
            future.add_done_callback(lambda _: tokens.put(None))
            try:
                if opening:
                    yield opening
                while (token := tokens.get()) is not None:
                    if chunk := detokenizer.add(token):
                        yield chunk
                future.result()
                if chunk := detokenizer.rest():
                    yield chunk
            finally:
                stop.set()

    def _batch(self, encoder: Encoder, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], str]:
        batch = prompt_batch(self.model, encoder, samples)
        opened = encoder.prompt_tokenizer.fixed(_OPEN_THOUGHT)
        opening = _OPEN_THOUGHT if batch["input_ids"][0, -len(opened) :].tolist() == list(opened) else ""
        return batch, opening


def _origin(model: nn.Module) -> tuple[dict[str, Any], str]:
    """config.json of a model as a dictionary, and the folder it was loaded from."""
    config: Any = model.config
    return config.to_dict(), str(getattr(model, "name_or_path", "") or "")


def _trained_ids(model: nn.Module) -> bool | None:
    """Whether images were numbered when the adapters of a model were trained; None without a record of it.

    Raises:
        ArgumentError: adapters of both kinds.
    """
    adapters: Any = getattr(model, "peft_config", None) or {}
    found = {name: recorded(config.auto_mapping, f"adapter {name}") for name, config in adapters.items()}
    if len(values := set(found.values())) > 1:
        each = ", ".join(f"{name}: {'as the base' if value is None else value}" for name, value in found.items())
        raise ArgumentError(f"the adapters were trained with different use_image_id ({each}): give use_image_id")
    return next(iter(values), None)


@lru_cache(maxsize=16)
def _encoder(name: str, tokenizer: PreTrainedTokenizerBase, config: str, prompting: ChatPromptOptions) -> Encoder:
    family = by_name(name)
    settings: Mapping[str, Any] = json.loads(config)
    written: PromptOptions = {}
    if prompting.enable_thinking is not None:
        written["enable_thinking"] = prompting.enable_thinking
    if prompting.use_tts_template and family.layout(settings).speech:
        written["spoken"] = "always"
    return Encoder(
        family,
        tokenizer,
        settings,
        max_slice_nums=prompting.max_slice_nums,
        max_length=prompting.max_inp_length,
        run_seconds=None if prompting.chunk_input is None else float(prompting.chunk_input),
        video=prompting.video,
        **written,
    )


@lru_cache(maxsize=16)
def _has_thinking_mode(name: str, tokenizer: PreTrainedTokenizerBase, config: str) -> bool:
    """Whether the prompt changes with enable_thinking."""
    question = Sample(id="", source=Source("chat", 0), messages=(Message("user", (Text("?"),)),))
    asked, not_asked = (
        _encoder(name, tokenizer, config, ChatPromptOptions(enable_thinking=wanted))
        .render(question, (), True)
        .input_ids
        for wanted in (True, False)
    )
    return asked != not_asked


class _TokenStreamer(BaseStreamer):
    """Streamer that puts new tokens into a queue; the first call passes the prompt, which is skipped."""

    def __init__(self, tokens: SimpleQueue[int | None]) -> None:
        self._tokens = tokens
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self._tokens.put(token)

    def end(self) -> None:
        """Nothing: the generating thread marks the end itself."""


class _StopRequested(StoppingCriteria):
    """Stops generation when the consumer has closed the stream."""

    def __init__(self, stop: Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)
