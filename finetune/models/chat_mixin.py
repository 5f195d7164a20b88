"""``ChatMixin``: gives the models the method ``chat``, with the signature of the published models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ChatMixin(PreTrainedModel):
    """Adds ``chat`` to a model."""

    def chat(
        self,
        image: Any = None,
        msgs: Any = None,
        context: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        system_prompt: str | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """The answer to a conversation, with the active adapter.

        Args:
            image: image (PIL, or a path), or several, before the first user turn; for a batch, one per
                conversation.
            msgs: turns with ``role`` and ``content`` (a string, or a list of strings, images and
                audio, numpy arrays at 16 kHz), or their JSON; a list of such lists is a batch.
            context: turns before ``msgs``, as V-2.0 returns them.
            tokenizer: of the checkpoint; None loads it from the folder of the model.
            system_prompt: text of a system turn.
            stream: return an iterator over chunks of the answer.
            **options: sampling (default True; False is greedy), temperature, top_p, top_k, repetition_penalty,
                num_beams, max_new_tokens, min_new_tokens; max_slice_nums, use_image_id, enable_thinking,
                max_inp_length; of MiniCPM-o use_tts_template, chunk_input, and omni_input (or omni_mode): items of a
                content are then not joined by newlines.

        Returns:
            The answer; for a batch a list of answers. V-2.0 returns answer, context, history, where the last two are
            both the conversation with the answer.

        Raises:
            ArgumentError: an option that does not exist, or that the model does not support.
            DataError: a conversation or an image that cannot be used.
        """
        # Imported here: ``chat`` is a package above ``models``.
        from finetune.chat.model_chat import chat

        if isinstance(context, PreTrainedTokenizerBase):  # from 2.5 on, the third argument of published calls
            context, tokenizer = None, context
        return chat(
            self,
            image=image,
            msgs=msgs,
            context=context,
            tokenizer=tokenizer,
            system_prompt=system_prompt,
            stream=stream,
            **options,
        )
