"""Settings of an encoder from those of its checkpoint: slicing, audio."""

from __future__ import annotations

from dataclasses import replace

from finetune.families.family import Config, Family
from finetune.media.audio_layout import AudioSpec
from finetune.media.slicing import SliceSpec
from finetune.media.small_print import check_installed


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
