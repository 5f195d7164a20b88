"""Implementation of ``model.chat(...)``; the method itself is in ``finetune.models.chat_mixin``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.chat.messages import read_messages
from finetune.chat.pipeline import ChatPipeline, read_options
from finetune.sample import Message, Sample, Text
from finetune.utils.errors import ArgumentError


def chat(
    model: PreTrainedModel,
    *,
    image: Any,
    msgs: Any,
    context: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    system_prompt: str | None,
    stream: bool,
    **options: Any,
) -> Any:
    """An answer, a stream of its chunks, or the answers of a batch; see ``Chatting.chat``.

    Raises:
        ArgumentError: an option that does not exist, or does not fit.
        DataError: a conversation or an image that cannot be used.
    """
    # MiniCPM-o: names of 2.6 and of 4.5.
    omni = any([options.pop(name, None) for name in ("omni_input", "omni_mode")])
    joint = "" if omni else "\n"
    prompting, decoding = read_options(options)
    talker = ChatPipeline(model, tokenizer)
    batched = isinstance(msgs, (list, tuple)) and bool(msgs) and isinstance(msgs[0], (list, tuple))
    if not batched:
        sample = read_messages(msgs, image, context=context, system_prompt=system_prompt, joint=joint)
        if stream:
            return talker.stream(sample, prompting, decoding)
        answers, samples = talker.answer([sample], prompting, decoding), [sample]
    else:
        if stream or context:
            raise ArgumentError(f"{'stream' if stream else 'context'} goes with one conversation, not with a batch")
        images = _spread(image, len(msgs))
        samples = [
            read_messages(turns, first_image, system_prompt=system_prompt, index=index, joint=joint)
            for index, (turns, first_image) in enumerate(zip(msgs, images, strict=True))
        ]
        answers = talker.answer(samples, prompting, decoding)
    if not talker.family.chat_gives_context:
        return answers if batched else answers[0]
    contexts = [_with_answer(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    histories = [list(turns) for turns in contexts]
    return (answers, contexts, histories) if batched else (answers[0], contexts[0], histories[0])


def _spread(image: Any, count: int) -> Sequence[Any]:
    """The image of every conversation of a batch."""
    if image is None:
        return [None] * count
    if not isinstance(image, (list, tuple)) or len(image) != count:
        given = len(image) if isinstance(image, (list, tuple)) else "one, not in a list"
        raise ArgumentError(f"{count} conversations but images: {given}; give one (or None) per conversation")
    return image


def _with_answer(sample: Sample, answer: str) -> list[dict[str, Any]]:
    """The conversation with its answer, in the format of ``msgs`` and ``context``."""
    messages = (*sample.messages, Message("assistant", (Text(answer),)))
    return [{"role": message.role, "content": _content(message)} for message in messages]


def _content(message: Message) -> Any:
    """A string, or a list when the message has media; newlines that joined its items are removed again."""
    if all(isinstance(part, Text) for part in message.parts):
        return message.text
    return [
        part.text if isinstance(part, Text) else part.data
        for part in message.parts
        if not (isinstance(part, Text) and part.text == "\n")
    ]
