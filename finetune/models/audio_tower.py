"""Audio tower of MiniCPM-o: Whisper's encoder for clips of up to 30 s, projection, pooling, checks of audio inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import nn
from torch.nn import functional as F
from transformers import WhisperConfig
from transformers import initialization as init
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from finetune.models.configuration import MiniCPMVConfig
from finetune.models.visual_items import check_inside

# Outputs of the encoder per second: 100 mel frames, halved by the second convolution.
_STEPS_PER_SECOND = 50


class AudioTower(WhisperEncoder):
    """Whisper's encoder with padding masked, and attention in chunks: a step sees its chunk and all before.

    It has its own attention implementation, because it needs a mask, which flash attention does not take.
    """

    def __init__(self, config: MiniCPMVConfig) -> None:
        # The decoder is not built; vocab_size would only make Whisper's configuration warn about token ids.
        part = WhisperConfig(**{k: v for k, v in config.read("audio_config", {}).items() if k != "vocab_size"})
        part._attn_implementation = _with_mask(config._attn_implementation)
        super().__init__(part)
        self.chunk = int(config.read("audio_chunk_length", 1.0) * _STEPS_PER_SECOND)

    def forward(self, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Features of the clips.

        Args:
            features: (clips, mel bins, T) log-mel.
            lengths: mel frames of each clip.

        Returns:
            (clips, steps of T, D); values after a clip's own steps are undefined.
        """
        frames = torch.tensor(lengths, device=features.device)
        outside = (torch.arange(features.shape[-1], device=features.device) >= frames[:, None])[:, None]
        # The convolutions look one frame ahead: padding must be zero before each of them, as at the end of a clip.
        x = features.to(self.conv1.weight.dtype).masked_fill(outside, 0)
        x = F.gelu(self.conv1(x)).masked_fill(outside, 0)
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        positions = torch.arange(x.shape[1], device=x.device)
        x = x + self.embed_positions(positions).to(x.dtype)
        mask = self._mask(lengths, x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.layer_norm(x)

    def _mask(self, lengths: Sequence[int], x: torch.Tensor) -> torch.Tensor | None:
        """Attention mask, (clips, 1, steps, steps); None for full attention. Every row attends to some step."""
        size = x.shape[1]
        chunk = self.chunk if self.chunk > 0 else size
        if size <= chunk and min(lengths) == max(lengths):
            return None
        steps = torch.tensor([steps_of(length) for length in lengths], device=x.device)
        at = torch.arange(size, device=x.device)
        seen = (at < steps[:, None])[:, None] & (at < ((at // chunk + 1) * chunk)[:, None])
        if self.config._attn_implementation == "eager":  # there the mask is added
            return torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)[:, None]
        return seen[:, None]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The implementation that this tower uses when one is set for the model."""
        return _with_mask(requested_attention)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.embed_positions:  # sizes from the configuration: with ZeRO-3 the tensor is empty here
            init.copy_(self.embed_positions.weight, sinusoids(self.config.max_source_positions, self.config.d_model))
        else:
            super()._init_weights(module)


def _with_mask(implementation: str | None) -> str:
    return "eager" if implementation == "eager" else "sdpa"


class AudioProjection(nn.Module):
    """Projects features of the audio tower to the width of the language model."""

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(input_size, size)
        self.linear2 = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., E)."""
        # A trained projection may be float32 on a 16 bit tower; its weights may be stored in 4 bit, its biases never.
        x = x.to(self.linear1.bias.dtype)
        return self.linear2(F.relu(self.linear1(x)))


def steps_of(frames: int) -> int:
    """Number of encoder outputs for a clip of ``frames`` mel frames."""
    return (frames - 1) // 2 + 1


def pooled(features: torch.Tensor, lengths: Sequence[int], step: int) -> torch.Tensor:
    """Average pooling over ``step`` neighbouring steps (complete windows only), all clips concatenated.

    Args:
        features: (clips, steps, E).
        lengths: mel frames of each clip.
        step: size of a window.

    Returns:
        (S, E), S the sum of ``steps_of(length) // step``.
    """
    x = F.avg_pool1d(features.transpose(1, 2), step).transpose(1, 2)
    counts = [steps_of(length) // step for length in lengths]
    if len(counts) == 1:
        return x[0]
    longest = x.shape[1]
    kept = torch.cat([torch.arange(count) + clip * longest for clip, count in enumerate(counts)])
    return x.flatten(0, 1)[kept.to(x.device)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clips:
    """The clips of a micro-batch.

    Attributes:
        features: (clips, mel bins, T) log-mel.
        lengths: mel frames of each clip.
        counts: tokens of each clip.
    """

    features: torch.Tensor
    lengths: list[int]
    counts: list[int]


def checked_clips(features: torch.Tensor, lengths: torch.Tensor, *, bins: int, longest: int, step: int) -> Clips:
    """The clips of a batch, possibly none.

    Args:
        features: (clips, mel bins, T).
        lengths: (clips,) mel frames.
        bins: mel bins of the tower.
        longest: maximum number of mel frames of a clip.
        step: encoder outputs per token.

    Raises:
        ValueError: the inputs do not match each other or the tower.
    """
    if features.ndim != 3 or features.shape[1] != bins:
        raise ValueError(f"audio_features must be (clips, {bins}, frames), got {tuple(features.shape)}")
    sizes = lengths.tolist()
    if len(sizes) != len(features):
        raise ValueError(f"{len(features)} audio clips, but {len(sizes)} audio_lengths")
    for clip, size in enumerate(sizes):
        if steps_of(size) < step:
            raise ValueError(f"audio clip {clip} has {size} mel frames; {2 * step - 1} are needed for one token")
        if size > min(longest, features.shape[2]):
            raise ValueError(
                f"audio clip {clip} has {size} mel frames, but audio_features holds {features.shape[2]} and the tower "
                f"takes {longest}: split longer audio into clips"
            )
    return Clips(features=features, lengths=sizes, counts=[steps_of(size) // step for size in sizes])


def dummy_clip(bins: int, step: int, device: torch.device) -> Clips:
    """A silent clip of one token, for batches without audio."""
    frames = 2 * step - 1
    return Clips(features=torch.zeros(1, bins, frames, device=device), lengths=[frames], counts=[1])


def split_clips(clips: Clips, most: int) -> list[Clips]:
    """The clips in chunks of at most ``most``, each padded to its longest clip."""
    chunks = []
    for start in range(0, len(clips.counts), most):
        place = slice(start, start + most)
        lengths = clips.lengths[place]
        features = clips.features[place, :, : max(lengths)]
        chunks.append(Clips(features=features, lengths=lengths, counts=clips.counts[place]))
    return chunks


def check_audio_bounds(bounds: list[list[int]], counts: list[int], embeddings: torch.Tensor) -> None:
    """Checks that the number of audio tokens is that of the placeholders, and that no clip is split between two rows.

    Within a row, clips fill the runs of placeholders one after another: one run per clip, or several (chunked input).

    Args:
        bounds: batch row, start and end of each run; the runs of a row are adjacent.
        counts: tokens of each clip, in the order of the rows.
        embeddings: (B, T, E).

    Raises:
        ValueError: naming the numbers that disagree.
    """
    check_inside(bounds, "audio_bound", embeddings)
    places = sum(end - start for _, start, end in bounds)
    if places != sum(counts):
        raise ValueError(f"the audio clips make {sum(counts)} tokens, but audio_bound has {places} placeholders")
    ends, filled, seen = {0, *accumulate(counts)}, 0, set[int]()
    for row, runs in groupby(bounds, key=lambda bound: bound[0]):
        own = sum(end - start for _, start, end in runs)
        filled += own
        if filled not in ends:
            raise ValueError(
                f"row {row} has {own} audio placeholders, but its clips make another number of tokens (tokens per "
                f"clip: {counts})"
            )
        if row in seen:
            raise ValueError(f"the rows of audio_bound that belong to batch row {row} are not next to each other")
        seen.add(row)
