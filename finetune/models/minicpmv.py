"""MiniCPM-V: vision tower, resampler and language model under the official parameter names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from finetune.models.chat_mixin import ChatMixin
from finetune.models.configuration import MiniCPMVConfig
from finetune.models.generation import MediaGenerationMixin
from finetune.models.initialization import initialize
from finetune.models.kv_cache import NAMES, as_installed, cache_of
from finetune.models.language_model import LANGUAGES, embedding_scale, logits_scaling
from finetune.models.lean_layers import put_lean_layers
from finetune.models.lm_head_loss import put_head, supervised_loss
from finetune.models.memory_saving import (
    MemorySavingMixin,
    chunk_counts,
    chunks_on_all_ranks,
    recomputed_in_chunks,
)
from finetune.models.packed_attention import packed_arguments
from finetune.models.resampler import RESAMPLERS, Resampler
from finetune.models.strict_loading import StrictLoadingMixin
from finetune.models.vision_choice import build_vision
from finetune.models.visual_items import (
    VisualItems,
    check_bounds,
    dummy_items,
    given_together,
    merge,
    read_items,
    split_items,
)

# Modules that device_map must not split.
NO_SPLIT_MODULES = ("Resampler", "QueryPositionResampler", "TemporalResampler")
# Position table in some 2.5 files; here it is computed.
OLD_TABLE = r"^resampler\.pos_embed$"


@dataclass
class MiniCPMVOutput(CausalLMOutputWithPast):
    """Output of ``forward``: loss if labels were given, else logits; cache, hidden states, attentions on request.

    Attributes:
        row_loss: (B, 2) float32, per row the sum of negative log likelihoods and the number of labelled tokens, if
            labels were given; for a packed row (s, 2), per segment.
    """

    row_loss: torch.Tensor | None = None


class MiniCPMV(  # pyright: ignore[reportIncompatibleMethodOverride]
    MemorySavingMixin, ChatMixin, MediaGenerationMixin, StrictLoadingMixin, GenerationMixin
):
    """MiniCPM-V, assembled from the vision tower, resampler and language model that its family names.

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
    _no_split_modules = [*NO_SPLIT_MODULES]
    _skip_keys_device_placement = [*NAMES]
    _keys_to_ignore_on_load_unexpected = [OLD_TABLE]

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        self._add_parts(config)
        self.post_init()

    def _add_parts(self, config: MiniCPMVConfig) -> None:
        network = config.family.network
        assert network is not None, config.family
        self.llm = LANGUAGES[network.language](config)
        put_head(self.llm)
        put_lean_layers(self.llm)
        self.embedding_scale = embedding_scale(config)
        self.vpm = build_vision(config, network)
        self.resampler = RESAMPLERS[network.resampler](config, self.vpm.output_size)
        self.query_num, self.temporal = self.resampler.queries, self.resampler.temporal
        self.patch_width = 3 * config.read("patch_size", 14) ** 2

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
        group_sizes: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        audio_bound: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        media_copies: int = 1,
        row_graph: bool = False,
        loss_weights: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MiniCPMVOutput:
        """Loss of a labelled batch, logits of any other.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T); None for a packed row.
            position_ids: (B, T) int64.
            past_key_values: another name of ``cache``.
            inputs_embeds: (B, T, E) instead of ``input_ids``, already scaled.
            labels: (B, T) int64, unshifted, -100 = no loss.
            patches: (N, 3*P*P) uint8, one row per patch in (channel, row, column) order, all items concatenated.
            tgt_sizes: (n, 2) int64, rows and columns of patches per item.
            image_bound: (g, 3) int64, batch row, start and end (half open) of each group's placeholders.
            temporal_ids: (n,) int64, time index of a packed video frame, -1 for stills.
            group_sizes: (g,) int64, number of consecutive items per group; the items of a group (frames packed
                together, of one row) share one run of placeholders. None if every item is a group, g = n.
            image_features: (g, Q, E) from ``get_image_features``, instead of patches, tgt_sizes, temporal_ids and
                group_sizes.
            audio_features: (clips, mel bins, T) float log-mel, padded with 0, clips in the order of the rows.
            audio_lengths: (clips,) int64, mel frames per clip.
            audio_bound: (m, 3) int64, batch row, start and end (half open) of each run of audio placeholders, in the
                order of the rows. The clips of a row fill its runs one after another: one run per clip, or several.
            audio_embeds: (S, E) from ``get_audio_embeds``, instead of audio_features and audio_lengths: the tokens
                that fill the runs of audio_bound in their order.
            cache: keys and values of earlier steps.
            use_cache: None means no cache when there are labels or segments.
            cu_seq_lens_q: (s + 1,) int32, boundaries of the segments of ONE packed row. Segments do not attend to each
                other, and the first label of each is ignored. attention_mask must be None, position_ids restart at 0
                with every segment, and cu_seq_lens_k, max_length_q and max_length_k (int) are given too.
            num_items_in_batch: divisor of the summed loss; None takes the mean over the labelled tokens.
            media_copies: how often the features of all media are repeated: image_bound and audio_bound name the
                placeholders of the first copy, then of the next. 2 for rows of two answers to the same media.
            row_graph: give ``row_loss`` a graph, instead of the loss.
            loss_weights: (B, T) float32, weight of every label in the loss; None for 1.
            logits_to_keep: number of last positions, or their indices; 0 keeps all. Only without labels.
            **kwargs: passed to the language model (output_attentions, ...).

        Raises:
            ValueError: the inputs do not match each other; the message has both numbers. Also for audio inputs of a
                model without audio tower, or segments with a mask or a cache.
        """
        embeddings = self._embed_text(input_ids) if inputs_embeds is None else inputs_embeds
        dummy = self.training or labels is not None
        visual = (patches, tgt_sizes, temporal_ids, group_sizes)
        embeddings = self._embed_items(embeddings, visual, image_bound, image_features, media_copies, dummy=dummy)
        audio = (audio_features, audio_lengths)
        embeddings = self._embed_audio(embeddings, audio, audio_bound, audio_embeds, media_copies, dummy=dummy)
        if use_cache is None and labels is not None:
            use_cache = False
        context: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache}
        past = as_installed(cache, past_key_values)
        if cu_seq_lens_q is not None:
            context |= packed_arguments(self.llm, cu_seq_lens_q, embeddings, position_ids, past=past, **context)
            kwargs["cu_seq_lens_q"] = cu_seq_lens_q
        kwargs.update(inputs_embeds=embeddings, position_ids=position_ids, return_dict=True, **context, **past)
        if labels is None:
            out = self.llm(logits_to_keep=logits_to_keep, **kwargs)
            return _output(out, logits=out.logits)
        out = self.llm.model(**kwargs)
        hidden, scaling = out.last_hidden_state, logits_scaling(self.llm)
        loss, row_loss = supervised_loss(
            hidden,
            labels,
            self.llm.lm_head,
            num_items_in_batch,
            scaling=scaling,
            bounds=cu_seq_lens_q,
            row_graph=row_graph,
            weights=loss_weights,
        )
        return _output(out, loss=loss, row_loss=row_loss)

    def get_image_features(
        self,
        patches: torch.Tensor,
        tgt_sizes: torch.Tensor,
        temporal_ids: torch.Tensor | None = None,
        group_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings of visual items.

        Args:
            patches: (N, 3*P*P) uint8, all items concatenated.
            tgt_sizes: (n, 2) rows and columns of patches per item.
            temporal_ids: (n,) time index of a packed video frame, -1 for stills.
            group_sizes: (g,) items per group; None if every item is a group, g = n.

        Returns:
            (g, Q, E).

        Raises:
            ValueError: patches, sizes and ids do not agree.
        """
        return self._encode(self._read_items(patches, tgt_sizes, temporal_ids, group_sizes))

    def _embed_text(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        if input_ids is None:
            raise ValueError("input_ids or inputs_embeds must be given")
        embeddings = self.get_input_embeddings()(input_ids)
        return embeddings if self.embedding_scale == 1 else embeddings * self.embedding_scale

    def _read_items(self, patches: torch.Tensor, tgt_sizes: torch.Tensor, *packing: torch.Tensor | None) -> VisualItems:
        return read_items(patches, tgt_sizes, *packing, width=self.patch_width, temporal=self.temporal)

    def _embed_items(
        self,
        embeddings: torch.Tensor,
        visual: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
        image_bound: torch.Tensor | None,
        features: torch.Tensor | None,
        copies: int,
        *,
        dummy: bool,
    ) -> torch.Tensor:
        """Text embeddings with image features at the placeholders.

        With ``dummy``, a batch without images runs every layer once on a dummy image whose result is multiplied by
        zero: all ranks of a distributed run must call the same layers, in training and in evaluation.
        """
        if features is not None:
            if image_bound is None:
                raise ValueError("image_features given without image_bound")
            check_bounds(image_bound.tolist(), len(features), self.query_num, embeddings)
            return merge(embeddings, features.flatten(0, 1), image_bound)
        patches, tgt_sizes, *packing = visual
        given_together(patches=patches, tgt_sizes=tgt_sizes, image_bound=image_bound)
        if patches is not None and tgt_sizes is not None and image_bound is not None:
            items = self._read_items(patches, tgt_sizes, *packing)
            check_bounds(image_bound.tolist(), copies * len(items.groups), self.query_num, embeddings)
            if items.groups:
                encoded = self._encode_chunks(items, in_step=dummy).flatten(0, 1)
                return merge(embeddings, encoded.repeat(copies, 1), image_bound)
        if dummy:
            features = self._encode_chunks(dummy_items(self.patch_width, embeddings.device), in_step=True)
            return embeddings + (features.mean() * 0).to(embeddings)
        return embeddings

    def _embed_audio(
        self,
        embeddings: torch.Tensor,
        audio: tuple[torch.Tensor | None, torch.Tensor | None],
        audio_bound: torch.Tensor | None,
        audio_embeds: torch.Tensor | None,
        copies: int,
        *,
        dummy: bool,
    ) -> torch.Tensor:
        """Embeddings with audio features at the placeholders, as for images; this class has no audio tower.

        Raises:
            ValueError: the batch has audio inputs.
        """
        if any(tensor is not None and len(tensor) for tensor in (*audio, audio_bound, audio_embeds)):
            raise ValueError(f"the batch has audio inputs, but {self.config.family.title} has no audio tower")
        return embeddings

    def _encode_chunks(self, items: VisualItems, *, in_step: bool) -> torch.Tensor:
        """As ``_encode``, in a step in chunks of at most ``vision_batch`` items, equally many on every rank."""
        if self.vision_batch is None or not in_step:
            return self._encode(items)
        chunks = split_items(items, chunk_counts(items.groups, self.vision_batch))
        idle = chunks_on_all_ranks(len(chunks), self.vpm, items.patches.device) - len(chunks)
        features = torch.cat([self._encode(chunk) for chunk in chunks])
        for _ in range(idle):
            features = features + self._encode(dummy_items(self.patch_width, items.patches.device)).mean() * 0
        return features

    def _encode(self, items: VisualItems) -> torch.Tensor:
        """Vision tower and resampler, each called once: (g, Q, E).

        Frozen parts run without a graph, so that a hook that makes inputs require gradients does not cause a backward
        pass through a frozen tower.
        """
        if not items.groups:
            shape = (0, self.query_num, self.config.hidden_size)
            return torch.zeros(shape, dtype=self.dtype, device=items.patches.device)
        trained = torch.is_grad_enabled()
        with torch.set_grad_enabled(trained and trainable(self.vpm)):
            features = self.vpm(items.patches, items.sizes)
        with torch.set_grad_enabled(trained and (features.requires_grad or trainable(self.resampler))):
            if self.recompute_resampler and self.training and torch.is_grad_enabled():
                return recomputed_in_chunks(self.resampler, replace(items, patches=features))
            return self.resampler(features, items.sizes, items.times, items.groups)

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
        """As in transformers; also updates the vocabulary size in the language model's configuration."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        put_head(self.llm)
        put_lean_layers(self.llm)
        self.llm.config.vocab_size = self.llm.vocab_size = self.config.vocab_size
        self.llm.model.vocab_size = self.config.vocab_size
        return embeddings

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module)
        if isinstance(module, Resampler):
            module.initialize()


def _output(out: Any, **values: Any) -> MiniCPMVOutput:
    return MiniCPMVOutput(hidden_states=out.hidden_states, attentions=out.attentions, **cache_of(out), **values)


def trainable(module: nn.Module) -> bool:
    """Whether any parameter of a module requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())
