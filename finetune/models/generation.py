"""Image and audio inputs in ``generate``: encoded in the first step only, repeated for beams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from finetune.models.visual_items import repeat_bounds

_VISUAL = ("patches", "tgt_sizes", "image_bound", "temporal_ids", "group_sizes", "image_features")
_AUDIO = ("audio_features", "audio_lengths", "audio_bound", "audio_embeds")


class MediaGenerationMixin(PreTrainedModel, GenerationMixin):
    """Passes image and audio inputs in the first step only, and repeats their features when rows are repeated."""

    if TYPE_CHECKING:  # the declared type of ``self`` in transformers matches no model

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,  # generate looks for this very name before it accepts inputs such as attention_mask
    ) -> dict[str, Any]:
        """Inputs of one decoding step; without a cache every step gets the media again.

        The cache is in ``kwargs``, under the name of the installed transformers.
        """
        media = {name: kwargs.pop(name, None) for name in (*_VISUAL, *_AUDIO)}
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs.update({name: value for name, value in media.items() if value is not None})
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeats every row for beams and several returned sequences.

        The default would repeat single patches. Here each item is encoded once, and its features are repeated.
        """
        visual = {name: model_kwargs.pop(name, None) for name in _VISUAL}
        audio = {name: model_kwargs.pop(name, None) for name in _AUDIO}
        ids, expanded = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if expand_size > 1 and visual["image_bound"] is not None:
            visual = self._repeat_items(visual, expand_size)
        if expand_size > 1 and audio["audio_bound"] is not None:
            audio = self._repeat_audio(audio, expand_size)
        expanded.update({name: value for name, value in (visual | audio).items() if value is not None})
        return ids, expanded

    def _repeat_items(self, visual: dict[str, Any], times: int) -> dict[str, Any]:
        """Features and bounds for ``times`` copies of each row; the copies of a row are adjacent."""
        features = visual["image_features"]
        if features is None:
            inputs = (visual[name] for name in ("patches", "tgt_sizes", "temporal_ids", "group_sizes"))
            features = self.get_image_features(*inputs)
        bounds = repeat_bounds(visual["image_bound"], times)
        return {"image_features": features.repeat_interleave(times, dim=0), "image_bound": bounds}

    def _repeat_audio(self, audio: dict[str, Any], times: int) -> dict[str, Any]:
        """The same for audio; a model without an audio tower raises in ``forward``."""
        return audio

    def get_image_features(
        self,
        patches: torch.Tensor,
        tgt_sizes: torch.Tensor,
        temporal_ids: torch.Tensor | None = None,
        group_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Resampled features, (g, Q, E); implemented by the model."""
        raise NotImplementedError
