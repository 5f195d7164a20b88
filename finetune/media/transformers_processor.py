"""Pixels by the image processors that transformers has for MiniCPM-V 4.6 and later, and for MiniCPM-OCR."""

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
    """Checks that the video processor of transformers knows the mode: that of 5.20 cuts frames in "16x" whatever it is.

    Args:
        spec: settings of the checkpoint.
        installed: version of transformers; None for the one that is installed.

    Raises:
        UserError: it does not; the message names both versions.
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
    """Patches of an RGB image as the processor makes them.

    Args:
        image: the decoded image.
        cuts: how it is cut, by ``plan`` with these settings or fewer slices.
        spec: settings of the checkpoint.
        maker: first part of the names of the processors' classes.
        video: whether it is a frame of a video, which has a processor of its own.

    Returns:
        (N, 3*P*P) float32, normalised, each patch in (channel, row, column) order; and the rows and columns of patches
        of every item, as the processor has cut it.
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
    """A number of most slices that gives this grid: the processor takes a limit, not a plan."""
    limits = range(max(spec.max_slice_nums, cuts.items), 0, -1)
    of = replace(spec, enlarge="always")  # whatever becomes of small images, the grid is the same
    found = (most for most in limits if plan(width, height, replace(of, max_slice_nums=most)).grid == cuts.grid)
    return next(found, spec.max_slice_nums)


@cache
def _processor(name: str) -> Any:
    import transformers

    return getattr(transformers, name)()
