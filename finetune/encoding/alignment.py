"""Whether placeholders, visual items, patches and sound of an encoded sample agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from finetune.encoding.video_frames import FrameItems
from finetune.media.audio_layout import Sound
from finetune.templates.rendering import IGNORE, Layout, Rendered


class AlignmentError(RuntimeError):
    """Placeholders, visual items and patches of a sample disagree: a fault of this program, not of the data."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Where placeholders belong.

    Attributes:
        layout: how the prompt is written.
        patch: side of a patch in pixels.
        placeholder: id that features of images and sound take the place of.
        moving: the same of videos.
    """

    layout: Layout
    patch: int
    placeholder: int
    moving: int

    def faults(self, rendered: Rendered, items: FrameItems, heard: Sequence[Sound]) -> Iterator[str]:
        """Items and clips without their run of placeholders, and placeholders elsewhere."""
        ids = rendered.input_ids
        runs = [ids[first:last] for first, last in rendered.image_bounds]
        if len(runs) != len(items.groups):
            yield f"{len(runs)} runs of placeholders for {len(items.groups)} visual items"
        first = [(*items.grids[place], items.video[place]) for place in items.firsts()]
        wanted = [self.layout.item_tokens(columns * self.patch, rows * self.patch) for rows, columns, _ in first]
        tokens = [self.moving if moving else self.placeholder for _, _, moving in first]
        if runs != [[token] * count for token, count in zip(tokens, wanted, strict=True)]:
            yield f"runs that are not of {wanted} placeholders"
        spoken = [ids[first:last] for first, last in rendered.audio_bounds]
        if spoken != [[self.placeholder] * count for each in heard for count in each.runs]:
            yield f"runs of sound that are not of {[each.runs for each in heard]} placeholders"
        total = sum(wanted) + sum(map(len, spoken))
        if (found := sum(map(ids.count, {self.placeholder, self.moving}))) != total:
            yield f"{found} placeholders, {total} of them in runs"
        if len(rendered.labels) != len(ids) or rendered.labels[0] != IGNORE:
            yield "labels that do not match the ids"


def media_faults(
    items: FrameItems, cut: list[tuple[int, int]], heard: Sequence[Sound], clips: Sequence[torch.Tensor]
) -> Iterator[str]:
    """Patches and mel frames that are not as many as the sizes of the media give."""
    if (frames := [clip.shape[1] for clip in clips]) != [count for each in heard for count in each.frames]:
        yield f"sound of {frames} mel frames where its length gives {[each.frames for each in heard]}"
    if cut != items.grids:
        yield f"items cut into {cut} patches where the image headers give {items.grids}"
