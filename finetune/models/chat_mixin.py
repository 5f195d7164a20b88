"""``model.chat``, in the form of the published networks."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ChatMixin(PreTrainedModel):
    """Gives a network its ``chat``."""

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
        """The answer to a conversation, with whatever adapter is active.

        Args:
            image: picture (PIL, or a path), or several, in front of the first user turn; of a batch, one per
                conversation.
            msgs: turns with ``role`` and ``content`` (a string, or a list of strings, pictures and
                sound, numpy arrays at 16 kHz), or their JSON; a list of such lists is a batch.
            context: turns before ``msgs``, as V-2.0 returns them.
            tokenizer: the checkpoint's; None for the one in the folder that the network came from.
            system_prompt: text of a system turn.
            stream: return an iterator over pieces of the answer.
            **options: sampling (default True; False is greedy), temperature, top_p, top_k, repetition_penalty,
                num_beams, max_new_tokens, min_new_tokens; max_slice_nums, use_image_id, enable_thinking,
                max_inp_length; of MiniCPM-o use_tts_template, chunk_input, and omni_input (or omni_mode): items of a
                content are then not joined by newlines.

        Returns:
            The answer; of a batch a list of them. V-2.0 returns answer, context, history, where the last two are both
            the conversation with the answer.

        Raises:
            ArgumentError: an option that does not exist, or does not fit the network.
            DataError: a conversation or an image that cannot be used.
        """
        # Late: what writes prompts stands above the networks, and only here does a network ask for it.
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
