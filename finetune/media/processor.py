"""Pixels by the image processor that transformers has for MiniCPM-V 4.6 and later."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image

from finetune.media.slicing import Plan, SliceSpec, plan

if TYPE_CHECKING:
    import torch

# Patches along a side that become one token, by the processor's name for it.
_MODES = {2: "4x", 4: "16x"}


def patch_rows(image: Image.Image, cuts: Plan, spec: SliceSpec) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Patches of an RGB image as the processor makes them.

    Args:
        image: the decoded image.
        cuts: how it is cut, by ``plan`` with these settings or fewer slices.
        spec: settings of the checkpoint.

    Returns:
        (N, 3*P*P) float32, normalised, each patch in (channel, row, column) order; and the rows and columns of patches
        of every item, as the processor has cut it.
    """
    most = _slices_of(cuts, *image.size, spec)
    given = _processor()(
        images=[image],
        max_slice_nums=most,
        scale_resolution=spec.scale_resolution,
        patch_size=spec.patch_size,
        downsample_mode=_MODES[spec.merge],
        return_tensors="pt",
    )
    side = spec.patch_size
    packed = given["pixel_values"][0]  # (3, P, N*P): the patches side by side
    rows = packed.reshape(3, side, -1, side).permute(2, 0, 1, 3).reshape(-1, 3 * side * side)
    return rows, [(height, width) for height, width in given["target_sizes"].tolist()]


def _slices_of(cuts: Plan, width: int, height: int, spec: SliceSpec) -> int:
    """A number of most slices that gives this plan: the processor takes a limit, not a plan."""
    limits = range(spec.max_slice_nums, 0, -1)
    found = (most for most in limits if plan(width, height, replace(spec, max_slice_nums=most)) == cuts)
    return next(found, spec.max_slice_nums)


@lru_cache(maxsize=1)
def _processor() -> Any:
    from transformers import MiniCPMV4_6ImageProcessor

    return MiniCPMV4_6ImageProcessor()
