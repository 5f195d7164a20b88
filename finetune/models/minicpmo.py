"""MiniCPM-o: MiniCPM-V plus an audio tower."""

from __future__ import annotations

from typing import Any

import torch

from finetune.models.audio_tower import (
    AudioProjection,
    AudioTower,
    Clips,
    check_audio_bounds,
    checked_clips,
    dummy_clip,
    pooled,
    split_clips,
)
from finetune.models.configuration import MiniCPMOConfig, MiniCPMVConfig
from finetune.models.memory_saving import is_partitioned
from finetune.models.minicpmv import NO_SPLIT_MODULES, OLD_TABLE, MiniCPMV, trainable
from finetune.models.visual_items import check_inside, given_together, merge, repeat_bounds


class MiniCPMO(MiniCPMV):
    """MiniCPM-o; its speech output (``tts.*`` in published files) is not built and not trained."""

    config_class = MiniCPMOConfig
    _no_split_modules = [*NO_SPLIT_MODULES, "AudioProjection"]
    _keys_to_ignore_on_load_unexpected = [OLD_TABLE, r"^tts\."]

    def _add_parts(self, config: MiniCPMVConfig) -> None:
        super()._add_parts(config)
        self.apm = AudioTower(config)
        self.audio_projection_layer = AudioProjection(self.apm.config.d_model, config.hidden_size)
        self.pool_step: int = config.read("audio_pool_step", 5)

    def get_audio_embeds(self, audio_features: torch.Tensor, audio_lengths: torch.Tensor) -> torch.Tensor:
        """Embeddings of clips.

        Args:
            audio_features: (clips, mel bins, T) log-mel.
            audio_lengths: (clips,) mel frames.

        Returns:
            (S, E), the tokens of all clips concatenated.

        Raises:
            ValueError: features and lengths do not match.
        """
        return self._encode_clips(self._checked_clips(audio_features, audio_lengths))

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
        if audio_embeds is not None:
            if audio_bound is None:
                raise ValueError("audio_embeds given without audio_bound")
            bounds = audio_bound.tolist()
            check_inside(bounds, "audio_bound", embeddings)
            if (places := sum(end - start for _, start, end in bounds)) != len(audio_embeds):
                raise ValueError(f"audio_embeds has {len(audio_embeds)} tokens, but audio_bound {places} placeholders")
            return merge(embeddings, audio_embeds, audio_bound)
        audio_features, audio_lengths = audio
        given_together(audio_features=audio_features, audio_lengths=audio_lengths, audio_bound=audio_bound)
        if audio_features is not None and audio_lengths is not None and audio_bound is not None:
            clips = self._checked_clips(audio_features, audio_lengths)
            check_audio_bounds(audio_bound.tolist(), copies * clips.counts, embeddings)
            if clips.counts:
                encoded = self._encode_clip_chunks(clips, in_step=dummy)
                return merge(embeddings, encoded.repeat(copies, 1), audio_bound)
        if dummy:
            silence = dummy_clip(self.apm.num_mel_bins, self.pool_step, embeddings.device)
            return embeddings + (self._encode_clips(silence).mean() * 0).to(embeddings)
        return embeddings

    def _checked_clips(self, features: torch.Tensor, lengths: torch.Tensor) -> Clips:
        longest = 2 * self.apm.max_source_positions
        return checked_clips(features, lengths, bins=self.apm.num_mel_bins, longest=longest, step=self.pool_step)

    def _encode_clip_chunks(self, clips: Clips, *, in_step: bool) -> torch.Tensor:
        """As ``_encode_clips``, in a step in chunks of at most ``vision_batch`` clips; in one chunk with ZeRO-3."""
        if self.vision_batch is None or not in_step or is_partitioned(self.apm):
            return self._encode_clips(clips)
        return torch.cat([self._encode_clips(chunk) for chunk in split_clips(clips, self.vision_batch)])

    def _encode_clips(self, clips: Clips) -> torch.Tensor:
        """Audio tower and projection, each called once: (S, E); frozen parts run without a graph."""
        if not clips.counts:
            return torch.zeros(0, self.config.hidden_size, dtype=self.dtype, device=clips.features.device)
        trained = torch.is_grad_enabled()
        with torch.set_grad_enabled(trained and trainable(self.apm)):
            features = self.apm(clips.features, clips.lengths)
        with torch.set_grad_enabled(trained and (features.requires_grad or trainable(self.audio_projection_layer))):
            return pooled(self.audio_projection_layer(features), clips.lengths, self.pool_step)

    def _repeat_audio(self, audio: dict[str, Any], times: int) -> dict[str, Any]:
        embeds, bounds = audio["audio_embeds"], audio["audio_bound"]
        if embeds is None:
            embeds = self.get_audio_embeds(audio["audio_features"], audio["audio_lengths"])
        runs = embeds.split((bounds[:, 2] - bounds[:, 1]).tolist())
        copies = [run for run in runs for _ in range(times)]
        return {
            "audio_embeds": torch.cat(copies) if copies else embeds,
            "audio_bound": repeat_bounds(bounds, times),
        }
