"""Settings of an encoder from those of its checkpoint: image backend, slicing, audio."""

from __future__ import annotations

from dataclasses import replace

from finetune.encoding.pixel_inputs import INPUTS, Backend, ImageBackend
from finetune.families.family import Config, Family
from finetune.media.audio_layout import AudioSpec
from finetune.media.slicing import SliceSpec
from finetune.media.small_print import check_installed
from finetune.utils.errors import UserError


def image_backend(family: Family, name: ImageBackend) -> Backend:
    """The image backend of that name.

    Raises:
        UserError: the family does not support it.
    """
    if name not in INPUTS[family.inputs].backends:
        raise UserError(
            f"--image_backend {name}: not supported by {family.title}, which uses the image processor of transformers; "
            "remove the option"
        )
    return INPUTS[family.inputs].backends[name]


def slicing_of(family: Family, config: Config, max_slice_nums: int | None) -> SliceSpec:
    """The slicing of a checkpoint, with another maximum number of slices if one is given.

    Raises:
        UserError: it needs a package that is not installed.
    """
    spec = family.slice_spec(config)
    if spec.enlarge == "adaptive":
        check_installed()
    return spec if max_slice_nums is None else replace(spec, max_slice_nums=max_slice_nums)


def audio_of(family: Family, config: Config, run_seconds: float | None) -> AudioSpec | None:
    """The audio settings of a checkpoint, with other runs of placeholders if they are given; None without audio."""
    spec = family.audio_spec and family.audio_spec(config)
    return spec if spec is None or run_seconds is None else replace(spec, run_seconds=run_seconds)
