"""Consistency checks of an encoded sample: placeholder runs against visual items, patches and mel frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from finetune.encoding.video_frames import FrameItems
from finetune.media.audio_layout import AudioPlan
from finetune.templates.prompt_types import IGNORE, PromptLayout, TokenizedPrompt

if TYPE_CHECKING:
    import torch

    from finetune.encoding.pixel_inputs import Patches


class AlignmentError(RuntimeError):
    """Placeholders and media inputs of a sample disagree: a bug in this program, not in the data."""


class DecodedMedia(NamedTuple):
    """The decoded media of a sample.

    Attributes:
        items: visual items and their sizes by the media headers.
        patches: (N, 3*P*P), of numpy or torch.
        log_mels: log-mel chunks of all audio clips.
    """

    items: FrameItems
    patches: Patches
    log_mels: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class PlaceholderCheck:
    """Checks the placeholder runs of a rendered prompt.

    Attributes:
        layout: prompt layout.
        patch: side of a patch in pixels.
        placeholder: token id that image features replace.
        video_placeholder: token id that features of video frames replace.
        audio_placeholder: token id that audio features replace.
    """

    layout: PromptLayout
    patch: int
    placeholder: int
    video_placeholder: int
    audio_placeholder: int

    def faults(self, rendered: TokenizedPrompt, items: FrameItems, audio_plans: Sequence[AudioPlan]) -> Iterator[str]:
        """Visual items and clips without their placeholder run, and placeholders outside of any run."""
        ids = rendered.input_ids
        runs = [ids[first:last] for first, last in rendered.image_bounds]
        if len(runs) != len(items.groups):
            yield f"{len(runs)} placeholder runs for {len(items.groups)} visual items"
        first = [(*items.grids[place], items.video[place]) for place in items.firsts()]
        expected = [self.layout.item_tokens(columns * self.patch, rows * self.patch) for rows, columns, _ in first]
        tokens = [self.video_placeholder if is_video else self.placeholder for _, _, is_video in first]
        if runs != [[token] * count for token, count in zip(tokens, expected, strict=True)]:
            yield f"placeholder runs whose lengths are not {expected}"
        audio_runs = [ids[first:last] for first, last in rendered.audio_bounds]
        if audio_runs != [[self.audio_placeholder] * count for plan in audio_plans for count in plan.runs]:
            yield f"audio placeholder runs whose lengths are not {[plan.runs for plan in audio_plans]}"
        total = sum(expected) + sum(map(len, audio_runs))
        if (found := sum(map(ids.count, {self.placeholder, self.video_placeholder, self.audio_placeholder}))) != total:
            yield f"{found} placeholder tokens, {total} of them in runs"
        if len(rendered.labels) != len(ids) or rendered.labels[0] != IGNORE:
            yield "labels that do not match input_ids"


def media_faults(
    items: FrameItems,
    grids: list[tuple[int, int]],
    audio_plans: Sequence[AudioPlan],
    log_mels: Sequence[torch.Tensor],
) -> Iterator[str]:
    """Differences between the decoded media and the sizes their headers gave.

    Args:
        items: visual items by the headers.
        grids: (rows, columns) of patches of every item after slicing.
        audio_plans: placeholders of every clip by its length.
        log_mels: (bins, T) log-mel chunks.
    """
    if (frames := [chunk.shape[1] for chunk in log_mels]) != [count for plan in audio_plans for count in plan.frames]:
        yield f"audio of {frames} mel frames, its length gives {[plan.frames for plan in audio_plans]}"
    if grids != items.grids:
        yield f"items of {grids} patches, the image headers give {items.grids}"
