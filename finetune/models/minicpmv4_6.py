"""MiniCPM-V 4.6, 4.7 and OCR: transformers' own (native) classes with our loss, packing and distributed training.

Each class has the name of its parent, so that saved checkpoints name the class of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from finetune.families import usable
from finetune.families.common import merge_of
from finetune.models.chat_mixin import ChatMixin
from finetune.models.kv_cache import as_installed, cache_of
from finetune.models.lm_head_loss import put_head, supervised_loss
from finetune.models.memory_saving import MemorySavingMixin, chunk_counts, chunks_on_all_ranks
from finetune.models.minicpmv import MiniCPMVOutput
from finetune.models.packed_attention import implementation_of, packed_arguments, segment_ids
from finetune.models.strict_loading import StrictLoadingMixin

# Rows and columns of patches of the smallest image that can be merged twice.
_DUMMY = (4, 4)


class NativeModelMixin(MemorySavingMixin, ChatMixin, StrictLoadingMixin):
    """Forward of the native classes: our loss, and every part called once per batch, on every rank alike."""

    accepts_loss_kwargs = True
    model: Any
    lm_head: nn.Linear

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_head(self)
        # transformers shares this module between all models of a process; DeepSpeed stores state of one model in it.
        merger = self.model.vision_tower.vit_merger
        merger.act = copy.deepcopy(merger.act)
        text = self.model.language_model.config
        text._attn_implementation = implementation_of(text._attn_implementation)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        put_head(self)
        return embeddings

    def forward(  # every input by name: ``generate`` inspects the signature
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        target_sizes: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        target_sizes_videos: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        downsample_mode: str | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        media_copies: int = 1,
        row_graph: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MiniCPMVOutput:
        """Loss of a labelled batch, logits of any other.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T).
            position_ids: (B, T), or (3 or 4, B, T) as 4.7 has them; None in training.
            past_key_values: another name of ``cache``.
            inputs_embeds: (B, T, E) instead of ``input_ids``.
            labels: (B, T) int64, unshifted, -100 = no loss.
            pixel_values: (1, 3, P, N*P) float, the patches of all items side by side.
            target_sizes: (n, 2) rows and columns of patches per item.
            pixel_values_videos: as pixel_values, of videos.
            target_sizes_videos: as target_sizes, of videos.
            mm_token_type_ids: (B, T) 1 for placeholders of images; 4.7 computes its positions from them.
            mm_encoder_outputs: features by kind of medium, instead of pixel values.
            downsample_mode: "16x" or "4x", as the placeholders were counted; None for that of ``config``, which loading
                sets (``model_folders.downsample_mode``).
            cache: keys and values of earlier steps.
            use_cache: None means no cache when there are labels.
            num_items_in_batch: divisor of the summed loss; None takes the mean over the labelled tokens.
            cu_seq_lens_q: (s + 1,) int32, boundaries of the segments of ONE packed row, as in ``MiniCPMV.forward``,
                with position_ids (1, T) that restart. Needs the kernels of ``Family.packing_kernels``.
            media_copies: how often the features of all media are repeated, as in ``MiniCPMV.forward``.
            row_graph: as in ``MiniCPMV.forward``.
            logits_to_keep: number of last positions, or their indices; 0 keeps all. Only without labels.
            **kwargs: passed to the language model.

        Raises:
            ValueError: pixels, sizes and placeholders do not match, or an unknown mode.
        """
        mode = downsample_mode or self.config.downsample_mode
        in_step = self.training or labels is not None
        features = dict(mm_encoder_outputs or {})
        media = {"image": (pixel_values, target_sizes), "video": (pixel_values_videos, target_sizes_videos)}
        features |= self._features_by_kind(media, mode, in_step=in_step)
        if media_copies > 1:
            features = {kind: _pooled([*(each.pooler_output or ())] * media_copies) for kind, each in features.items()}
            target_sizes, target_sizes_videos = (
                sizes if sizes is None else sizes.repeat(media_copies, 1)
                for sizes in (target_sizes, target_sizes_videos)
            )
        # A batch without images runs a dummy image times zero, before the embeddings as images are: with ZeRO-3 all
        # ranks must call the same layers in the same order.
        idle = None
        if not features and in_step:
            idle = torch.cat(self.visual_features(*self._dummy(), mode, in_step=True)).mean() * 0
        embedded: torch.Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if idle is not None:
            embedded = embedded + idle.to(device=embedded.device, dtype=embedded.dtype)
        if mm_token_type_ids is not None:  # 4.6 has no such argument
            kwargs["mm_token_type_ids"] = mm_token_type_ids
        kwargs |= _no_router_logits(self.model.language_model)
        context: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache}
        if use_cache is None and labels is not None:
            context["use_cache"] = False
        past = as_installed(cache, past_key_values)
        if cu_seq_lens_q is not None:
            llm = self.model.language_model
            context |= packed_arguments(llm, cu_seq_lens_q, embedded, position_ids, past=past, **context)
            kwargs |= {"cu_seq_lens_q": cu_seq_lens_q, "seq_idx": segment_ids(cu_seq_lens_q, embedded.shape[1])}
            if mm_token_type_ids is not None and (target_sizes is not None or target_sizes_videos is not None):
                sizes = {"target_sizes": target_sizes, "target_sizes_videos": target_sizes_videos}
                rope = self._rope_positions(input_ids, mm_token_type_ids, cu_seq_lens_q, downsample_mode=mode, **sizes)
                assert position_ids is not None  # checked by packed_arguments
                position_ids = torch.cat([position_ids[None], rope])
        out = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=embedded,
            target_sizes=target_sizes,
            target_sizes_videos=target_sizes_videos,
            mm_encoder_outputs=features,
            downsample_mode=mode,
            **context,
            **past,
            **kwargs,
        )
        hidden = out.last_hidden_state
        more = cache_of(out) | {name: getattr(out, name, None) for name in ("hidden_states", "attentions")}
        if labels is not None:
            loss, row_loss = supervised_loss(
                hidden, labels, self.lm_head, num_items_in_batch, bounds=cu_seq_lens_q, row_graph=row_graph
            )
            return MiniCPMVOutput(loss=loss, row_loss=row_loss, **more)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return MiniCPMVOutput(logits=self.lm_head(hidden[:, kept]), **more)

    def _features_by_kind(
        self, media: Mapping[str, tuple[torch.Tensor | None, torch.Tensor | None]], mode: str, *, in_step: bool
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Features of each kind of media (its pixels and sizes) that a batch has."""
        seen = {kind: (pixels, sizes) for kind, (pixels, sizes) in media.items() if pixels is not None}
        if in_step and len(seen) > 1:
            # Images and videos in one pass: all ranks must call every layer equally often.
            return self._features_of_all(seen, mode)
        return {kind: _pooled(self.visual_features(*each, mode, in_step=in_step)) for kind, each in seen.items()}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but with ``save_original_format`` off: the names here are the published ones.

        After loading with ZeRO-3, transformers 5.23 would revert renamings that it did not apply.
        """
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(*args, **kwargs)

    def _rope_positions(
        self, input_ids: torch.Tensor | None, types: torch.Tensor, bounds: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Positions (3, 1, T) of the tokens of a packed row for 4.7 (time, row, column), computed per segment."""
        if input_ids is None:
            raise ValueError("a packed row with images needs input_ids: the positions depend on the placeholders")
        lengths = bounds.diff().tolist()
        ids, types, mask = (
            pad_sequence(list(row.split(lengths)), batch_first=True)
            for row in (input_ids[0], types[0], torch.ones_like(input_ids[0]))
        )
        positions, _ = self.model.get_rope_index(ids, mm_token_type_ids=types, attention_mask=mask, **options)
        return positions[:, mask.bool()][:, None]

    def _dummy(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and size of a grey dummy image."""
        embeddings = self.model.vision_tower.embeddings
        sizes = torch.tensor([_DUMMY], device=self.device)
        width = _DUMMY[0] * _DUMMY[1] * embeddings.patch_size
        return torch.zeros(1, 3, embeddings.patch_size, width, device=self.device), sizes

    def _features_of_all(
        self, seen: dict[str, tuple[torch.Tensor, torch.Tensor | None]], mode: str
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Features of images and videos with one call of every layer."""
        for pixels, sizes in seen.values():
            _checked_sizes(pixels, sizes, merge_of(mode))
        counts = [len(sizes) for _, sizes in seen.values() if sizes is not None]
        pixels = torch.cat([pixels for pixels, _ in seen.values()], dim=3)
        sizes = torch.cat([sizes for _, sizes in seen.values() if sizes is not None])
        items = iter(self.visual_features(pixels, sizes, mode, in_step=True))
        return {kind: _pooled([next(items) for _ in range(count)]) for kind, count in zip(seen, counts, strict=True)}

    def visual_features(
        self, pixel_values: torch.Tensor, target_sizes: torch.Tensor | None, mode: str, *, in_step: bool
    ) -> list[torch.Tensor]:
        """Vision tower and merger: (tokens, E) per item.

        With ``in_step`` each is called once, or once per chunk of ``vision_batch`` items, equally often on every rank.
        """
        if target_sizes is None or self.vision_batch is None or not in_step:
            return self._features(pixel_values, target_sizes, mode, in_step=in_step)
        _checked_sizes(pixel_values, target_sizes, merge_of(mode))
        counts = chunk_counts([1] * len(target_sizes), self.vision_batch)
        idle = chunks_on_all_ranks(len(counts), self.model.vision_tower, pixel_values.device) - len(counts)
        sizes = target_sizes.split(counts)
        widths = [int(part.prod(1).sum()) * pixel_values.shape[2] for part in sizes]
        features: list[torch.Tensor] = []
        for pixels, part in zip(pixel_values.split(widths, dim=3), sizes, strict=True):
            features += self._features(pixels, part, mode, in_step=True)
        for _ in range(idle):
            features[0] = features[0] + torch.cat(self._features(*self._dummy(), mode, in_step=True)).mean() * 0
        return features

    def _features(
        self, pixel_values: torch.Tensor, target_sizes: torch.Tensor | None, mode: str, *, in_step: bool
    ) -> list[torch.Tensor]:
        """Vision tower and merger: (tokens, E) per item.

        With ``in_step`` tower and merger are called once for all items; else the merger runs item by item, as in the
        native class, with bit-identical logits. Frozen parts run without a graph.
        """
        tower, merger = self.model.vision_tower, self.model.merger
        merge = merge_of(mode)
        windows = merge > 2  # the merger inside the tower halves the sides too
        sizes = _checked_sizes(pixel_values, target_sizes, merge)
        trained = torch.is_grad_enabled()
        with torch.set_grad_enabled(trained and _trainable(tower)):
            pixels = pixel_values.to(dtype=tower.dtype)
            hidden = tower(pixels, target_sizes=target_sizes, use_vit_merger=windows).last_hidden_state
            if not windows and torch.is_grad_enabled():
                hidden = hidden + _idle(tower.vit_merger, hidden, target_sizes)
        if windows:
            sizes = [(rows // 2, columns // 2) for rows, columns in sizes]
        with torch.set_grad_enabled(trained and (hidden.requires_grad or _trainable(merger))):
            if in_step:
                return merge_patches(merger, hidden[0], sizes)
            return merger(hidden, torch.tensor(sizes, device=hidden.device))


def _no_router_logits(language_model: nn.Module) -> dict[str, Any]:
    """Disables router logits of a mixture of experts, which the loss does not use and transformers 5.24 fails on."""
    return {"output_router_logits": False} if hasattr(language_model.config, "output_router_logits") else {}


def _pooled(features: list[torch.Tensor]) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(pooler_output=features)  # pyright: ignore[reportArgumentType]


def _idle(window_merger: nn.Module, hidden: torch.Tensor, target_sizes: Any) -> torch.Tensor:
    """Zero that depends on the merger that "4x" does not use: distributed training needs a gradient everywhere."""
    return window_merger(hidden[:, :4].detach(), target_sizes.new_tensor([[2, 2]])).sum() * 0


def _trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _checked_sizes(pixel_values: torch.Tensor, target_sizes: torch.Tensor | None, merge: int) -> list[tuple[int, int]]:
    """Rows and columns of every item.

    Raises:
        ValueError: no sizes, pixels of another shape or number, or sides that cannot be merged.
    """
    if target_sizes is None:
        raise ValueError("pixel_values given without target_sizes")
    if pixel_values.ndim != 4 or len(pixel_values) != 1:
        raise ValueError(
            f"pixel_values must be (1, 3, P, N*P), all items side by side, got {tuple(pixel_values.shape)}"
        )
    sizes = [(rows, columns) for rows, columns in target_sizes.tolist()]
    given, expected = pixel_values.shape[3] // pixel_values.shape[2], sum(rows * columns for rows, columns in sizes)
    if given != expected:
        raise ValueError(f"target_sizes add up to {expected} patches, but {given} were given")
    if uneven := [size for size in sizes if size[0] % merge or size[1] % merge]:
        raise ValueError(
            f"an item of {uneven[0][0]} x {uneven[0][1]} patches cannot be merged by {merge}: were the images sliced "
            "with another downsample_mode than that of config.json?"
        )
    return sizes


def _trainable_class(name: str) -> type[PreTrainedModel]:
    """The class of transformers called ``name`` with our forward pass; it keeps the name, which checkpoints store."""
    return type(name, (NativeModelMixin, getattr(transformers, name)), {"__module__": __name__, "__doc__": f"{name}."})


NATIVE_MODELS: dict[str, type[PreTrainedModel]] = {
    family.published.config["model_type"]: _trainable_class(family.auto_mapping[0])
    for family in usable()
    if family.network is None
}
"""By the model_type of config.json: the families whose classes are in transformers."""


def merge_patches(merger: Any, hidden: torch.Tensor, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Merges the patches of each kernel window to one token.

    The merger's own forward calls its layers once per item. Here they are called once for all items, because with
    ZeRO-3 all ranks must call them equally often.

    Args:
        merger: with ``mlp`` (one per round), ``merge_kernel_size`` and ``merger_times``.
        hidden: (N, D) all items concatenated.
        sizes: rows and columns per item; their products add up to N.

    Returns:
        (tokens, E) per item.
    """
    down, across = merger.merge_kernel_size
    for layer in merger.mlp[: merger.merger_times]:
        items = hidden.split([rows * columns for rows, columns in sizes])
        sizes = [(rows // down, columns // across) for rows, columns in sizes]
        blocks = [
            item.view(rows, down, columns, across, -1).transpose(1, 2).reshape(rows * columns, -1)
            for item, (rows, columns) in zip(items, sizes, strict=True)
        ]
        hidden = layer(torch.cat(blocks))
    return list(hidden.split([rows * columns for rows, columns in sizes]))
