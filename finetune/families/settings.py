"""Settings of preprocessing and prompt in a checkpoint: which file and key each value is read from, per family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from finetune.utils.errors import CheckpointError

Processor = Literal["image_processor", "video_processor", "audio_processor"]
File = Literal["config.json"] | Processor
"""config.json, and the settings of the image, video and audio processors of a checkpoint."""
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
"""Processor to the files (and the key inside) of its settings in transformers; the first existing one is used."""
FILES = "setting_files"
"""Key of ``BaseCheckpoint.settings`` with the file that each processor was read from."""


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A file and key that may have a value.

    Attributes:
        file: the file or processor.
        key: its key, dots between the keys of nested dictionaries.
        default: default of the class that reads the file, if the file exists without the key; None to try the next
            place.
    """

    file: File
    key: str
    default: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting of prompts or pixels.

    Attributes:
        places: files and keys, in the order in which published inference reads them.
        default: default of the published code if no file has the value.
        agree: whether contradicting files are refused, because the model works with one of the values only.
        only: the only supported value; None for any.
        source: how the published code reads it, for docs/settings.md.
    """

    places: tuple[ConfigKey, ...] = ()
    default: Any = None
    agree: bool = False
    only: Any = None
    source: str = ""


Table = Mapping[str, Setting]
DOWNSAMPLE_MODE = "downsample_mode"
"""Name of the setting of families whose model supports several patch merging factors."""


class Found(NamedTuple):
    """A value found in a file.

    Attributes:
        value: the value.
        where: file and key, for messages.
    """

    value: Any
    where: str


def value_of(config: Mapping[str, Any], setting: Setting) -> Any:
    """The value of a setting, read as in published inference.

    Args:
        config: config.json, with ``image_processor`` etc. if the checkpoint has their settings.
        setting: the setting.
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
    """Messages about settings that have different values in several files, with the value in use.

    Args:
        config: as for ``value_of``.
        table: the settings of the family.
        given: names of settings that the user has set.

    Raises:
        CheckpointError: contradicting values that must agree, or an unsupported value.
    """
    messages = []
    for name, setting in table.items():
        held = list(_held(config, setting))
        used = value_of(config, setting)
        if setting.only is not None and used != setting.only:
            where = next((found.where for found in held if found.value == used), "the published code")
            raise CheckpointError(f"{name} is {used} in {where}; only {setting.only} is supported, as published")
        others = [found for found in held if found.value != used]
        if not others or name in given:
            continue
        first = next((found.where for found in held if found.value == used), "")
        values = ", ".join(f"{found.value} in {found.where}" for found in others)
        by = f"in {first}" if first else "the default of the published code"
        if setting.agree:
            raise CheckpointError(
                f"{name} is {used} ({by}) and {values}: the model works with one of them only. The files belong to "
                "different checkpoints; download the checkpoint again"
            )
        messages.append(f"{name} is {used} ({by}), which published inference reads; {values} is not used")
    return messages


def _held(config: Mapping[str, Any], setting: Setting) -> Iterator[Found]:
    """The values in the files, in the order of ``places``."""
    names = config.get(FILES) or {}
    for place in setting.places:
        settings = _settings(config, place.file)
        value = None if settings is None else _at(settings, place.key)
        if value is not None:
            yield Found(value, f"{names.get(place.file, place.file)} ({place.key})")


def _settings(config: Mapping[str, Any], file: File) -> Mapping[str, Any] | None:
    """The content of a file, None if the checkpoint has no such file."""
    return config if file == "config.json" else config.get(file)


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _processor(key: str, default: Any = None) -> ConfigKey:
    return ConfigKey("image_processor", key, default)


def _config(key: str, default: Any = None) -> ConfigKey:
    return ConfigKey("config.json", key, default)


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
"""2.0: the published ``model.chat`` uses config.json and no processor."""

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
"""2.5: preprocessor_config.json if there is one (later revisions), else config.json."""

WITH_IMAGE_IDS: Table = {
    **PROCESSOR_FIRST,
    "use_image_id": Setting(
        places=(_processor("use_image_id", False), _config("use_image_id", True)),
        source="chat(use_image_id=None) takes that of the image processor",
    ),
}
"""2.6 to 4.5: also numbered images."""

_MEL: Table = {
    "mel_bins": Setting(
        places=(ConfigKey("audio_processor", "feature_size"), _config("audio_config.num_mel_bins")),
        default=80,
        agree=True,
    ),
    "hop_length": Setting(places=(ConfigKey("audio_processor", "hop_length", 160),), default=160),
    "n_fft": Setting(places=(ConfigKey("audio_processor", "n_fft", 400),), default=400),
    "chunk_seconds": Setting(places=(ConfigKey("audio_processor", "chunk_length", 30),), default=30),
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
    """A setting that must be equal in the image and video processors, as in every published checkpoint."""
    places = (_processor(key, default), ConfigKey("video_processor", key))
    return Setting(places=places, default=default, agree=True, only=only)


TRANSFORMERS: Table = {
    "max_slice_nums": Setting(places=(_processor("max_slice_nums", 9),), default=9),
    "slice_mode": Setting(places=(_processor("slice_mode", True),), default=True),
    "scale_resolution": _both("scale_resolution", 448),
    "patch_size": Setting(
        places=(
            _processor("patch_size", 14),
            ConfigKey("video_processor", "patch_size"),
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
            ConfigKey("video_processor", DOWNSAMPLE_MODE),
        ),
        default="16x",
        source="the model merges by config.json, the processors count placeholders by their own files, and images "
        "fail if these differ; here one value is used for both",
    ),
    "video_max_slice_nums": Setting(places=(ConfigKey("video_processor", "max_slice_nums", 9),), default=9),
    "video_slice_mode": Setting(places=(ConfigKey("video_processor", "slice_mode", True),), default=True),
    "video_max_frames": Setting(places=(ConfigKey("video_processor", "max_num_frames", 128),), default=128),
}
"""4.6 and later: the processors of transformers, which do not read config.json."""

OCR: Table = {
    **TRANSFORMERS,
    DOWNSAMPLE_MODE: replace(TRANSFORMERS[DOWNSAMPLE_MODE], default="4x"),
    "small_image_upsize": Setting(places=(_processor("small_image_upsize", "always"),), default="always"),
}
"""MiniCPM-OCR: as 4.6, with four times as many tokens by default and a setting for small images."""
