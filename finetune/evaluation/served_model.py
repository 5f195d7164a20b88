"""Asks a server (vLLM, llama.cpp, ...) for answers by the chat completions protocol, with the prompts of training."""

from __future__ import annotations

import base64
import importlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.encoding.encoder import Encoder
from finetune.media import image
from finetune.sample import DataError, Media, Sample, Text
from finetune.utils.errors import ArgumentError, UserError, located

VLLM, LLAMA_CPP = "vllm", "llamacpp"
"""What the servers call the owner of their models."""
# vLLM puts images in front and joins texts with newlines unless their place is in the text itself.
_PLACE = "(<image>./</image>)"
_TOP = 20
_TOKEN_ID = "token_id:"


def openai() -> Any:
    """The client's module.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ArgumentError(f"--url needs the openai client ({error}): pip install -e '.[served]'") from error


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """An answer of a server.

    Attributes:
        text: the answer, white space around it stripped.
        prompt_tokens: number of tokens of its prompt; None where it does not say so.
        prompt_ids: their ids; None where it does not say so.
        first: log-probability of the likeliest first tokens by id; empty where it does not say so.
    """

    text: str
    prompt_tokens: int | None = None
    prompt_ids: list[int] | None = None
    first: dict[int, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """All but the text, for a file."""
        values = asdict(self)
        del values["text"]
        return values


class ServedModel:
    """A model on a server; its methods may be called by several threads.

    Args:
        url: of the server, ending with /v1.
        name: of the model; None for the only one.
        encoder: of the checkpoint that is served, by which prompts are written as in training; None sends messages
            as they are.
        options: further fields of every request.
        details: whether to ask for prompt ids and log-probabilities too.
        max_new_tokens: maximum length of an answer in tokens.
        refuse_above_pixels: maximum number of pixels of an image; None for the default.
        max_pixels: larger images are downscaled to at most this many pixels; None for never.

    Raises:
        UserError: no server there, or several models and no name.
        ArgumentError: the client is not installed.
    """

    def __init__(
        self,
        url: str,
        name: str | None,
        encoder: Encoder | None,
        *,
        options: Mapping[str, Any],
        details: bool,
        max_new_tokens: int,
        refuse_above_pixels: int | None,
        max_pixels: int | None,
    ) -> None:
        self._openai = openai()
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = self._openai.OpenAI(base_url=url, api_key=key, timeout=600)
        self.url, self.encoder, self.details = url, encoder, details
        self._pixels = (image.MAX_PIXELS if refuse_above_pixels is None else refuse_above_pixels, max_pixels)
        models = {model.id: str(getattr(model, "owned_by", "") or "") for model in self._asked(self._models)}
        if name is None and len(models) != 1:
            raise UserError(f"{url} serves {', '.join(models) or 'nothing'}: name one by --served_model")
        if name is not None and name not in models:
            raise UserError(f"--served_model {name}: {url} serves {', '.join(models) or 'nothing'}")
        self.name = name or next(iter(models))
        self.kind = models[self.name]
        self._options: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0, "seed": 0}
        self._extra = {**options, **self._penalties()}
        if details:
            self._options |= {"logprobs": True, "top_logprobs": _TOP}
            self._extra |= {"return_token_ids": True, "return_tokens_as_token_ids": True} if self.kind == VLLM else {}

    def _penalties(self) -> dict[str, Any]:
        """Greedy decoding without the penalties and other defaults of a server's own files."""
        stops = {} if self.encoder is None else {"stop_token_ids": self.encoder.stop_ids}
        return {VLLM: {"repetition_penalty": 1.0, **stops}, LLAMA_CPP: {"repeat_penalty": 1.0}}.get(self.kind, {})

    def _models(self) -> list[Any]:
        return list(self._client.models.list())

    def answer(self, sample: Sample) -> ServedAnswer:
        """The greedy answer to a conversation that ends with a user turn.

        Raises:
            DataError: a medium that cannot be sent.
            UserError: the server refuses the request or does not answer.
        """
        messages = list(self._messages(sample))
        create = self._client.chat.completions.create
        answer = self._asked(
            lambda: create(model=self.name, messages=messages, extra_body=self._extra, **self._options),
            f"{sample.source}: ",
        )
        choice, more = answer.choices[0], answer.model_extra or {}
        return ServedAnswer(
            (choice.message.content or "").strip(),
            answer.usage.prompt_tokens if answer.usage else None,
            more.get("prompt_token_ids"),
            _first_token(choice) if self.details else None,
        )

    def _asked(self, request: Any, where: str = "") -> Any:
        try:
            return request()
        except self._openai.APIStatusError as error:
            raise UserError(f"{where}{self.url} answers {error.status_code}: {error.message}") from error
        except self._openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise UserError(f"{where}no server answers at {self.url} ({reason}): start it, or correct --url") from error

    def _messages(self, sample: Sample) -> Iterator[dict[str, Any]]:
        """The messages; the marks of images are those by which this kind of server writes the prompt of training."""
        number = 0
        for message in sample.messages:
            parts: list[Any] = []
            for part in message.parts:
                if isinstance(part, Text):
                    parts.append(part.text)
                    continue
                parts += [*self._marks(number), self._image(part, sample)]
                number += 1
            if len(message.parts) == 1 and isinstance(parts[0], str):
                yield {"role": message.role, "content": parts[0]}
            else:
                yield {"role": message.role, "content": list(self._content(parts))}

    def _marks(self, number: int) -> list[str]:
        """Text in front of an image."""
        if self.encoder is None:
            return []
        if self.kind == LLAMA_CPP and self.encoder.layout.image_ids:
            return [f"<image_id>{number}</image_id>"]  # llama.cpp does not number images
        return [_PLACE] if self._in_text() else []

    def _in_text(self) -> bool:
        """Whether images have their place in the text: vLLM's classes for the generations with our own networks."""
        return self.kind == VLLM and self.encoder is not None and self.encoder.family.network is not None

    def _content(self, parts: list[Any]) -> Iterator[dict[str, Any]]:
        """Parts of a message; neighbouring texts are one, since servers put newlines between them."""
        if self._in_text():
            yield {"type": "text", "text": "".join(part for part in parts if isinstance(part, str))}
            yield from (part for part in parts if not isinstance(part, str))
            return
        text = ""
        for part in [*parts, None]:
            if isinstance(part, str):
                text += part
                continue
            if text:
                yield {"type": "text", "text": text}
            text = ""
            if part is not None:
                yield part

    def _image(self, media: Media, sample: Sample) -> dict[str, Any]:
        """An image as PNG, so that the server gets the pixels of training."""
        if media.kind != "image":
            raise DataError(
                f"{sample.source}: {media}: --url sends images; remove the record, or evaluate without --url"
            )
        most, shrink = self._pixels
        file = io.BytesIO()
        with located(sample.source):
            image.shrink(image.load(media, most), shrink).save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}


def _first_token(choice: Any) -> dict[int, float]:
    """Log-probabilities of the likeliest first tokens, by their ids as far as the server says them."""
    content = choice.logprobs and choice.logprobs.content
    found = {}
    for entry in content[0].top_logprobs if content else []:
        number = (entry.model_extra or {}).get("id")
        if number is None and entry.token.startswith(_TOKEN_ID):
            number = entry.token.removeprefix(_TOKEN_ID)
        if number is not None:
            found[int(number)] = entry.logprob
    return found
