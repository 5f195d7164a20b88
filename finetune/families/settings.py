"""Where published inference reads its settings: one table per generation, whose places are asked in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from finetune.utils.errors import CheckpointError

Processor = Literal["image_processor", "video_processor", "audio_processor"]
File = Literal["config.json"] | Processor
"""config.json itself, and what a folder says of how images, videos and sound become numbers."""
PROCESSORS: Mapping[Processor, tuple[tuple[str, str], ...]] = {
    "image_processor": (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")),
    "video_processor": (
        ("processor_config.json", "video_processor"),
        ("video_preprocessor_config.json", ""),
        ("preprocessor_config.json", ""),
    ),
    "audio_processor": (
        ("processor_config.json", "audio_processor"),
        ("processor_config.json", "feature_extractor"),
        ("preprocessor_config.json", ""),
    ),
}
"""Processor to the files (and the key inside) that transformers takes its settings from: the first that there is."""
FILES = "setting_files"
"""Key under which ``Checkpoint.settings`` says which file each processor was read from."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value may stand.

    Attributes:
        file: in which file.
        key: its key, dots between the keys of nested dictionaries.
        default: of the class that reads the file, where the file is there without the key; None for none, and the next
            place is asked.
    """

    file: File
    key: str
    default: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A value that shapes prompts or pixels.

    Attributes:
        places: where it may stand, in the order in which published inference asks.
        default: of the published code where no file decides.
        agree: whether a folder whose files disagree is refused, because the network fits one of the values only.
        only: the one value that this project can do, None for any; another one is refused.
        source: how the published code decides it, for docs/settings.md.
    """

    places: tuple[Place, ...] = ()
    default: Any = None
    agree: bool = False
    only: Any = None
    source: str = ""


Table = Mapping[str, Setting]
DOWNSAMPLE_MODE = "downsample_mode"
"""Name of the setting that families have whose network merges patches in one of several ways."""


class Found(NamedTuple):
    """A value that a file holds.

    Attributes:
        value: what it is.
        where: file and key, for messages.
    """

    value: Any
    where: str


def value_of(config: Mapping[str, Any], setting: Setting) -> Any:
    """What published inference takes.

    Args:
        config: config.json, with ``image_processor`` and the like where the folder describes them.
        setting: what is looked for.
    """
    for place in setting.places:
        settings = _settings(config, place.file)
        if settings is None:
            continue
        value = _at(settings, place.key)
        if value is None:
            value = place.default
        if value is not None:
            return value
    return setting.default


def disagreements(config: Mapping[str, Any], table: Table, given: frozenset[str] = frozenset()) -> list[str]:
    """In words: the settings of which the files of a folder hold different values, and which is used.

    Args:
        config: as for ``value_of``.
        table: the settings of the generation.
        given: names of settings that the user has decided.

    Raises:
        CheckpointError: values that have to agree do not, or one that this project cannot do.
    """
    said = []
    for name, setting in table.items():
        held = list(_held(config, setting))
        used = value_of(config, setting)
        if setting.only is not None and used != setting.only:
            where = next((found.where for found in held if found.value == used), "the published code")
            raise CheckpointError(f"{name} is {used} by {where}; only {setting.only} is supported, as published")
        others = [found for found in held if found.value != used]
        if not others or name in given:
            continue
        first = next((found.where for found in held if found.value == used), "")
        values = ", ".join(f"{found.value} in {found.where}" for found in others)
        by = f"in {first}" if first else "the default of the published code"
        if setting.agree:
            raise CheckpointError(
                f"{name} is {used} ({by}) and {values}: the network fits one of them only. The files belong to "
                "different checkpoints; download the folder again"
            )
        said.append(f"{name} is {used} ({by}), which published inference reads; {values} is not used")
    return said


def _held(config: Mapping[str, Any], setting: Setting) -> Iterator[Found]:
    """What the files hold, in their order."""
    names = config.get(FILES) or {}
    for place in setting.places:
        settings = _settings(config, place.file)
        value = None if settings is None else _at(settings, place.key)
        if value is not None:
            yield Found(value, f"{names.get(place.file, place.file)} ({place.key})")


def _settings(config: Mapping[str, Any], file: File) -> Mapping[str, Any] | None:
    """What a file says, None where the folder has no such file."""
    return config if file == "config.json" else config.get(file)


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _processor(key: str, default: Any = None) -> Place:
    return Place("image_processor", key, default)


def _config(key: str, default: Any = None) -> Place:
    return Place("config.json", key, default)


_HALVES = [0.5, 0.5, 0.5]

CONFIG_FIRST: Table = {
    "max_slice_nums": Setting(places=(_config("max_slice_nums", 9), _processor("max_slice_nums"))),
    "slice_mode": Setting(places=(_config("slice_mode", True), _processor("slice_mode"))),
    "scale_resolution": Setting(places=(_config("scale_resolution", 448), _processor("scale_resolution"))),
    "patch_size": Setting(places=(_config("patch_size", 14), _processor("patch_size"))),
    "query_num": Setting(places=(_config("query_num", 64), _processor("image_feature_size"))),
    "image_mean": Setting(default=_HALVES, only=_HALVES, source="constant of the published code"),
    "image_std": Setting(default=_HALVES, only=_HALVES, source="constant of the published code"),
}
"""2.0: the chat of the published model slices by config.json and uses no processor."""

PROCESSOR_FIRST: Table = {
    "max_slice_nums": Setting(
        places=(_processor("max_slice_nums", 9), _config("slice_config.max_slice_nums", 1)),
        source="chat(max_slice_nums=None) takes that of the image processor",
    ),
    "slice_mode": Setting(places=(_processor("slice_mode", True), _config("slice_mode", True))),
    "scale_resolution": Setting(
        places=(_processor("scale_resolution", 448), _config("slice_config.scale_resolution", 448))
    ),
    "patch_size": Setting(
        places=(_processor("patch_size", 14), _config("slice_config.patch_size"), _config("patch_size", 14)),
        agree=True,
    ),
    "query_num": Setting(places=(_config("query_num", 64), _processor("image_feature_size")), agree=True),
    "image_mean": Setting(places=(_processor("norm_mean", _HALVES),), default=_HALVES, only=_HALVES),
    "image_std": Setting(places=(_processor("norm_std", _HALVES),), default=_HALVES, only=_HALVES),
}
"""2.5: with a preprocessor_config.json, as its later revisions have it, by that; without one by config.json."""

NUMBERED: Table = {
    **PROCESSOR_FIRST,
    "use_image_id": Setting(
        places=(_processor("use_image_id", False), _config("use_image_id", True)),
        source="chat(use_image_id=None) takes that of the image processor",
    ),
}
"""2.6 to 4.5: images have numbers too."""

_MEL: Table = {
    "mel_bins": Setting(
        places=(Place("audio_processor", "feature_size"), _config("audio_config.num_mel_bins")), default=80, agree=True
    ),
    "hop_length": Setting(places=(Place("audio_processor", "hop_length", 160),), default=160),
    "n_fft": Setting(places=(Place("audio_processor", "n_fft", 400),), default=400),
    "chunk_seconds": Setting(places=(Place("audio_processor", "chunk_length", 30),), default=30),
}
# Whisper's log-mel frames.
O2_6_AUDIO: Table = {
    **_MEL,
    "audio_pool_step": Setting(places=(_config("audio_pool_step", 2), _processor("audio_pool_step")), agree=True),
    "run_seconds": Setting(default=1.0, source="chat(chunk_input=True) writes a run of placeholders per second"),
}
O4_5_AUDIO: Table = {
    **_MEL,
    "audio_pool_step": Setting(places=(_config("audio_pool_step", 5), _processor("audio_pool_step")), agree=True),
    "run_seconds": Setting(
        default=0, source="chat(stream_input=False) writes one run of placeholders per clip, whatever config.json says"
    ),
}


def _both(key: str, default: Any, only: Any = None) -> Setting:
    """A setting that the processors of images and of videos share here, as in every published folder."""
    places = (_processor(key, default), Place("video_processor", key))
    return Setting(places=places, default=default, agree=True, only=only)


TRANSFORMERS: Table = {
    "max_slice_nums": Setting(places=(_processor("max_slice_nums", 9),), default=9),
    "slice_mode": Setting(places=(_processor("slice_mode", True),), default=True),
    "scale_resolution": _both("scale_resolution", 448),
    "patch_size": Setting(
        places=(
            _processor("patch_size", 14),
            Place("video_processor", "patch_size"),
            _config("vision_config.patch_size"),
        ),
        default=14,
        agree=True,
    ),
    "use_image_id": Setting(
        places=(_processor("use_image_id", True),), default=True, source="of images and, in 4.6, of videos"
    ),
    "image_mean": _both("image_mean", _HALVES, only=_HALVES),
    "image_std": _both("image_std", _HALVES, only=_HALVES),
    "rescale_factor": _both("rescale_factor", 1 / 255, only=1 / 255),
    "do_resize": _both("do_resize", True, only=True),
    "do_rescale": _both("do_rescale", True, only=True),
    "do_normalize": _both("do_normalize", True, only=True),
    DOWNSAMPLE_MODE: Setting(
        places=(
            _config(DOWNSAMPLE_MODE),
            _processor(DOWNSAMPLE_MODE),
            Place("video_processor", DOWNSAMPLE_MODE),
        ),
        default="16x",
        source="the network merges by config.json, the processors count placeholders by their own files, and images "
        "fail where these differ; here one value serves both",
    ),
    "video_max_slice_nums": Setting(places=(Place("video_processor", "max_slice_nums", 9),), default=9),
    "video_slice_mode": Setting(places=(Place("video_processor", "slice_mode", True),), default=True),
    "video_max_frames": Setting(places=(Place("video_processor", "max_num_frames", 128),), default=128),
}
"""4.6 and later: the processors of transformers, which never ask config.json."""

OCR: Table = {
    **TRANSFORMERS,
    DOWNSAMPLE_MODE: replace(TRANSFORMERS[DOWNSAMPLE_MODE], default="4x"),
    "small_image_upsize": Setting(places=(_processor("small_image_upsize", "always"),), default="always"),
}
"""MiniCPM-OCR: as 4.6, four times as many tokens by default, and a rule for small images."""
