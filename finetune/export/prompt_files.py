"""Writes prompt documentation beside an exported model: an example prompt, and a Modelfile for Ollama."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.checkpoints.base_checkpoint import BaseCheckpoint
from finetune.encoding.encoder import Encoder
from finetune.sample import DataError, Media, Message, Sample, Source, Text
from finetune.tokenizers.tokenization import load_tokenizer

EXAMPLE, MODELFILE = "prompt_example.md", "Modelfile"
IMAGE_ID = "<image_id>0</image_id>"
_QUESTION, _SIDE = "What does the picture show?", 448
# What begins a turn.
_TURN = r"<\|(?:im_start|start_header_id)\|>"
# Words that stand for the contents of turns.
_SYSTEM, _FIRST, _ANSWER, _SECOND = "SYSTEMTEXT", "FIRSTTEXT", "ANSWERTEXT", "SECONDTEXT"


@dataclass(frozen=True, slots=True)
class PromptPieces:
    """What stands around the contents of turns in a prompt, without the bos token, which servers add.

    Attributes:
        opening: before the first turn of a conversation without system turn.
        system: before and after the text of a system turn; None if there is no such turn.
        user: before the text of a user turn.
        reply: between a question and its answer, in the turns before the last.
        answered: after an answer.
        generation: after the last question.
    """

    opening: str
    system: tuple[str, str] | None
    user: str
    reply: str
    answered: str
    generation: str


def encoder_of(base: BaseCheckpoint) -> Encoder:
    """The encoder of a checkpoint."""
    return Encoder(base.family, load_tokenizer(base.folder), base.settings)


def prompt_pieces(encoder: Encoder) -> PromptPieces:
    """The pieces, out of prompts that the encoder writes."""
    start, generation = _written(encoder, ("user", _FIRST)).split(_FIRST)
    turns = _written(encoder, ("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND))
    reply, between = turns.split(_FIRST)[1].split(_SECOND)[0].split(_ANSWER)
    user = _last_header(between)
    try:
        before, after = _written(encoder, ("system", _SYSTEM), ("user", _FIRST)).split(_FIRST)[0].split(_SYSTEM)
        system = (before, after.removesuffix(user))
    except DataError:
        system = None
    return PromptPieces(start.removesuffix(user), system, user, reply, between.removesuffix(user), generation)


def modelfile(encoder: Encoder, language: str, projector: str) -> str:
    """Ollama's Modelfile for two GGUF files beside it, with the prompt of training as its template."""
    pieces = prompt_pieces(encoder)
    number = "{{ if .Images }}" + IMAGE_ID + "{{ end }}" if encoder.layout.image_ids else ""
    turns = "{{ range .Messages }}"
    if pieces.system is not None:
        turns += '{{ if eq .Role "system" }}' + "{{ .Content }}".join(pieces.system) + '{{ else if eq .Role "user" }}'
    else:
        turns += '{{ if eq .Role "user" }}'
    turns += f"{pieces.user}{number}{{{{ .Content }}}}{{{{ else }}}}{pieces.reply}{{{{ .Content }}}}{pieces.answered}"
    turns += "{{ end }}{{ end }}" + pieces.generation
    opening = pieces.opening and '{{ if ne (index .Messages 0).Role "system" }}' + pieces.opening + "{{ end }}"
    stops = "".join(f"PARAMETER stop {json.dumps(token)}\n" for token in encoder.family.stop_tokens)
    return (
        f"# {encoder.family.title}: the template is the prompt of training"
        f"{', exact for one picture in a conversation' if number else ''}.\n"
        f'FROM ./{language}\nFROM ./{projector}\nTEMPLATE """{opening}{turns}"""\n'
        f"{stops}PARAMETER temperature 0\nPARAMETER num_ctx 4096\n"
    )


def prompt_example(encoder: Encoder) -> str:
    """A page with the prompt for one image and a question, and the request that makes llama.cpp write it."""
    image = Image.new("RGB", (_SIDE, _SIDE))
    parts = (Media("image", image), Text(f"\n{_QUESTION}"))
    sample = Sample("example", Source("export", 0), (Message("user", parts),))
    ids = encoder.encode(sample, generate=True).input_ids.tolist()
    text = _shortened(str(encoder.tokenizer.decode(ids)), encoder.layout.placeholder)
    note = ", which does not number images by itself" if _id(encoder) else ""
    body = json.dumps(request_body(encoder), indent=2, ensure_ascii=False)
    return f"""# Prompt of this model

One image of {_SIDE}x{_SIDE} and a question, as in training ({len(ids)} tokens; runs of placeholders are shortened):

```text
{text}
```

The same for the chat completions of llama.cpp's server{note}:

```json
{body}
```

`python -m finetune evaluate --url URL --compare MODEL --data DATA` compares what a server answers with what MODEL, this
model before it was converted, answers here.
"""


def request_body(encoder: Encoder) -> dict[str, Any]:
    """A chat completions request for one image and a question, by which llama.cpp writes the prompt of training."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    typed = [{"type": "text", "text": _id(encoder)}] if _id(encoder) else []
    content = [*typed, image, {"type": "text", "text": f"\n{_QUESTION}"}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "temperature": 0}
    return {**body, **thinking_options(encoder)}


def thinking_options(encoder: Encoder) -> dict[str, Any]:
    """The request's arguments of the chat template that give the encoder's thinking mode; empty without one."""
    wanted = encoder.layout.enable_thinking
    if wanted is None or "enable_thinking" not in str(encoder.tokenizer.chat_template or ""):
        return {}
    return {"chat_template_kwargs": {"enable_thinking": wanted}}


def write_prompt_files(folder: Path, encoder: Encoder, *, language: str = "", projector: str = "") -> None:
    """Writes the example and, for GGUF files, the Modelfile."""
    (folder / EXAMPLE).write_text(prompt_example(encoder), encoding="utf-8")
    if language:
        (folder / MODELFILE).write_text(modelfile(encoder, language, projector), encoding="utf-8")


def _id(encoder: Encoder) -> str:
    return IMAGE_ID if encoder.layout.image_ids else ""


def _written(encoder: Encoder, *turns: tuple[Any, str]) -> str:
    messages = tuple(Message(role, (Text(text),)) for role, text in turns)
    ids = encoder.render(Sample("export", Source("export", 0), messages), (), True).input_ids
    bos = str(encoder.tokenizer.bos_token or "")
    # In Qwen's tokenizers the token that begins a turn is called bos; it is no token that servers add.
    return str(encoder.tokenizer.decode(ids)).removeprefix("" if re.fullmatch(_TURN, bos) else bos)


def _shortened(text: str, placeholder: str) -> str:
    run = rf"(?:{re.escape(placeholder)}){{2,}}"
    return re.sub(run, lambda found: f"({len(found[0]) // len(placeholder)} x {placeholder})", text)


def _last_header(text: str) -> str:
    """The header of the turn that begins last in a text."""
    return text[max(found.start() for found in re.finditer(_TURN, text)) :]
