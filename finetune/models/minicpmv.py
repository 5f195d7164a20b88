"""MiniCPM-V: vision tower, resampler and language model under the official parameter names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.generation import VisualGeneration
from finetune.models.initialization import initialize
from finetune.models.items import (
    Items,
    check_bounds,
    check_patches,
    check_temporal,
    dummy_patches,
    merge,
    read_items,
)
from finetune.models.language import LANGUAGES, logits_of
from finetune.models.losses import supervised_loss
from finetune.models.positions import Sizes
from finetune.models.resampler import RESAMPLERS, Resampler
from finetune.models.strict import StrictLoading
from finetune.models.vision import build_vision


@dataclass
class MiniCPMVOutput(ModelOutput):
    """What ``forward`` returns.

    Attributes:
        loss: scalar, when labels were given.
        logits: (B, T, V) or the last of them, when no labels were given.
        past_key_values: the cache, when one is used.
        hidden_states: when asked for.
        attentions: when asked for.
        row_loss: (B, 2) float32, per row the sum of negative log likelihoods and the number of labelled tokens, when
            labels were given.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    row_loss: torch.Tensor | None = None


class MiniCPMV(VisualGeneration, StrictLoading, GenerationMixin):
    """A MiniCPM-V network assembled from the parts that its family names.

    Raises:
        UnknownFamilyError: the configuration belongs to no supported generation.
    """

    config: MiniCPMVConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = MiniCPMVConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Resampler", "QueryPositionResampler"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"^resampler\.pos_embed$"]

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        network = config.family.network
        language = LANGUAGES[network.language]
        self.llm = language.build(config)
        self.embedding_scale = language.embedding_scale(config)
        self.vpm = build_vision(config, network)
        self.resampler = RESAMPLERS[network.resampler](config, self.vpm.output_size)
        self.query_num = self.resampler.queries
        self.patch_width = 3 * config.read("patch_size", 14) ** 2
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        tgt_sizes: torch.Tensor | None = None,
        image_bound: torch.Tensor | None = None,
        temporal_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MiniCPMVOutput:
        """Loss of a labelled batch, logits of any other.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T); None for packed rows.
            position_ids: (B, T) int64.
            past_key_values: cache of earlier steps.
            inputs_embeds: (B, T, E) in place of ``input_ids``, already scaled.
            labels: (B, T) int64, unshifted, -100 = no loss.
            patches: (N, 3*P*P) uint8, one row per patch in (channel, row, column) order, all items concatenated.
            tgt_sizes: (n, 2) int64, rows and columns of patches per item.
            image_bound: (n, 3) int64, batch row, start and end (half open) of each item's placeholders.
            temporal_ids: (n,) int64, -1 for stills.
            image_features: (n, Q, E) from ``get_image_features``, in place of patches, tgt_sizes and temporal_ids.
            use_cache: None means no cache when there are labels or packed rows.
            num_items_in_batch: divisor of the summed loss; None takes the mean over the labelled tokens.
            logits_to_keep: number of last positions, or their indices; 0 keeps all. Only without labels.
            **kwargs: handed on to the language model (cu_seq_lens_q, output_attentions, ...).

        Raises:
            ValueError: the visual inputs do not agree; the message names both numbers.
        """
        embeddings = self._embed_text(input_ids) if inputs_embeds is None else inputs_embeds
        if image_features is None:
            items = self._read_items(embeddings, patches, tgt_sizes, image_bound, temporal_ids)
            embeddings = self._embed_items(embeddings, items, dummy=self.training or labels is not None)
        else:
            embeddings = self._embed_features(embeddings, image_features, image_bound)
        if use_cache is None and (labels is not None or "cu_seq_lens_q" in kwargs):
            use_cache = False  # with a cache, transformers silently lets packed segments see each other
        kwargs.update(inputs_embeds=embeddings, attention_mask=attention_mask, position_ids=position_ids)
        kwargs.update(past_key_values=past_key_values, use_cache=use_cache, return_dict=True)
        if labels is None:
            out = self.llm(logits_to_keep=logits_to_keep, **kwargs)
            return _output(out, logits=out.logits)
        out = self.llm.model(**kwargs)
        loss, row_loss = supervised_loss(
            out.last_hidden_state, labels, lambda hidden: logits_of(self.llm, hidden), num_items_in_batch
        )
        return _output(out, loss=loss, row_loss=row_loss)

    def get_image_features(
        self, patches: torch.Tensor, tgt_sizes: torch.Tensor, temporal_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings of visual items.

        Args:
            patches: (N, 3*P*P) uint8, all items concatenated.
            tgt_sizes: (n, 2) rows and columns of patches per item.
            temporal_ids: (n,), -1 for stills.

        Returns:
            (n, Q, E).

        Raises:
            ValueError: patches, sizes and ids do not agree.
        """
        sizes = [(height, width) for height, width in tgt_sizes.tolist()]
        check_temporal(None if temporal_ids is None else temporal_ids.tolist(), len(sizes))
        check_patches(patches, sizes, self.patch_width)
        if not sizes:
            return torch.zeros(0, self.query_num, self.config.hidden_size, dtype=self.dtype, device=patches.device)
        return self._encode(patches, sizes)

    def _embed_text(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        if input_ids is None:
            raise ValueError("input_ids or inputs_embeds must be given")
        embeddings = self.get_input_embeddings()(input_ids)
        return embeddings if self.embedding_scale == 1 else embeddings * self.embedding_scale

    def _read_items(self, embeddings: torch.Tensor, *visual: torch.Tensor | None) -> Items | None:
        shape = (embeddings.shape[0], embeddings.shape[1])
        return read_items(*visual, queries=self.query_num, width=self.patch_width, shape=shape)

    def _embed_items(self, embeddings: torch.Tensor, items: Items | None, *, dummy: bool) -> torch.Tensor:
        """Text embeddings with the images in their places.

        A batch without images still runs every layer once when ``dummy`` is set, with a result of zero: the ranks of a
        distributed run must all call the same layers, in training and in evaluation.
        """
        if items is not None:
            return merge(embeddings, self._encode(items.patches, items.sizes), items.rows, items.starts)
        if dummy:
            features = self._encode(dummy_patches(self.patch_width, embeddings.device), [(2, 2)])
            return embeddings + (features.mean() * 0).to(device=embeddings.device, dtype=embeddings.dtype)
        return embeddings

    def _embed_features(
        self, embeddings: torch.Tensor, features: torch.Tensor, image_bound: torch.Tensor | None
    ) -> torch.Tensor:
        if image_bound is None:
            raise ValueError("image_features given without image_bound")
        shape = (embeddings.shape[0], embeddings.shape[1])
        check_bounds(image_bound.tolist(), len(features), self.query_num, shape)
        return merge(embeddings, features, image_bound[:, 0], image_bound[:, 1])

    def _encode(self, patches: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """Vision tower and resampler, each called once: (n, Q, E).

        Parts without a trainable parameter run without a graph, so that a hook which makes inputs require gradients
        does not buy a backward pass through a frozen tower.
        """
        trained = torch.is_grad_enabled()
        with torch.set_grad_enabled(trained and _trainable(self.vpm)):
            features = self.vpm(patches, sizes)
        with torch.set_grad_enabled(trained and (features.requires_grad or _trainable(self.resampler))):
            return self.resampler(features, sizes)

    def get_input_embeddings(self) -> nn.Module:
        """The text embedding table."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text embedding table."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return self.llm.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the output projection."""
        self.llm.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers, and keeps the vocabulary size of the language model's own configuration in step."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.llm.config.vocab_size = self.llm.vocab_size = self.config.vocab_size
        self.llm.model.vocab_size = self.config.vocab_size
        return embeddings

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module)
        if isinstance(module, Resampler):
            module.initialize()


def _output(out: Any, **values: torch.Tensor) -> MiniCPMVOutput:
    return MiniCPMVOutput(
        past_key_values=out.past_key_values, hidden_states=out.hidden_states, attentions=out.attentions, **values
    )


def _trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
