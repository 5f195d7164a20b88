"""Patches from transformers' own image and video processors (MiniCPM-V 4.6 and later, MiniCPM-OCR)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from finetune.media.slicing import MERGES, SlicePlan, SliceSpec, plan
from finetune.utils.errors import UserError

if TYPE_CHECKING:
    import torch

_MODES = {merge: mode for mode, merge in MERGES.items()}


@cache
def _installed() -> str:
    return version("transformers")


def check_videos(spec: SliceSpec, installed: str | None = None) -> None:
    """Checks that transformers' video processor supports the downsample_mode; 5.20 always uses "16x".

    Args:
        spec: slicing settings of the checkpoint.
        installed: version of transformers; None for the installed one.

    Raises:
        UserError: it does not; the message has both versions.
    """
    if _MODES.get(spec.merge) != "4x":
        return
    given = installed or _installed()
    if given.startswith("5.20."):
        raise UserError(
            f"videos with downsample_mode 4x need transformers 5.21 or newer, installed is {given}: "
            "pip install 'transformers>=5.21', or use --downsample_mode 16x"
        )


def patch_rows(
    image: Image.Image, cuts: SlicePlan, spec: SliceSpec, *, maker: str = "MiniCPMV4_6", video: bool = False
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Patches of an RGB image, computed by the processor.

    Args:
        image: the decoded image.
        cuts: its slice plan, from ``plan`` with these settings or a smaller max_slice_nums.
        spec: slicing settings of the checkpoint.
        maker: prefix of the processor class names.
        video: whether it is a video frame, for which the video processor is used.

    Returns:
        (N, 3*P*P) float32, normalised, each patch in (channel, row, column) order; and the (rows, columns) of patches
        of every item.
    """
    options: dict[str, Any] = {
        "max_slice_nums": _slices_of(cuts, *image.size, spec),
        "scale_resolution": spec.scale_resolution,
        "patch_size": spec.patch_size,
        "downsample_mode": _MODES[spec.merge],
        "return_tensors": "pt",
    }
    suffix = "_videos" if video else ""
    if video:
        frames = np.array(image).transpose(2, 0, 1)[None]
        processor = _processor(f"{maker}VideoProcessor")
        given = processor(videos=[frames], do_sample_frames=False, stack_frames=1, **options)
    else:
        if spec.enlarge != "always":
            options["small_image_upsize"] = spec.enlarge
        given = _processor(f"{maker}ImageProcessor")(images=[image], **options)
    side = spec.patch_size
    packed = given[f"pixel_values{suffix}"][0]  # (3, P, N*P): the patches side by side
    rows = packed.reshape(3, side, -1, side).permute(2, 0, 1, 3).reshape(-1, 3 * side * side)
    return rows, [(height, width) for height, width in given[f"target_sizes{suffix}"].tolist()]


def _slices_of(cuts: SlicePlan, width: int, height: int, spec: SliceSpec) -> int:
    """A max_slice_nums that gives this grid: the processor takes a limit, not a plan."""
    limits = range(max(spec.max_slice_nums, cuts.items), 0, -1)
    of = replace(spec, enlarge="always")  # upscaling of small images does not change the grid
    found = (most for most in limits if plan(width, height, replace(of, max_slice_nums=most)).grid == cuts.grid)
    return next(found, spec.max_slice_nums)


@cache
def _processor(name: str) -> Any:
    import transformers

    return getattr(transformers, name)()
