"""Media of chat messages: images, audio and videos in memory, as files, or as base64."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.media.image_files import decode
from finetune.sample import AUDIO_SUFFIXES, DataError, Media, Source
from finetune.utils.file_types import is_file
from finetune.utils.paths import expand
from finetune.utils.quoting import shown

Picture = Image.Image | Path | str | bytes
"""A PIL image, the path of a file (Path or str), or the bytes of a file."""


def img2base64(file: str | Path) -> str:
    """The bytes of a file as base64.

    Raises:
        DataError: there is no such file.
    """
    path = Path(file)
    if not is_file(path):
        raise DataError(f"{path}: no such image file")
    return base64.b64encode(path.read_bytes()).decode("ascii")


def from_base64(text: str | bytes, source: Source) -> Image.Image:
    """The picture that base64 (with or without a ``data:`` head) stands for.

    Raises:
        DataError: it is not base64, or not a picture.
    """
    try:
        given = text.encode("ascii") if isinstance(text, str) else text
        data = base64.b64decode(given.rpartition(b",")[2] if given.startswith(b"data:") else given, validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise DataError(f"{source}: the image is not base64 ({error}); img2base64(path) makes it") from error
    return decode(data, source)


def as_media(picture: Picture, source: Source) -> Media:
    """A picture as a part of a conversation.

    Raises:
        DataError: there is no such file, or the bytes are not a picture.
    """
    if isinstance(picture, Image.Image):
        return Media("image", picture)
    if isinstance(picture, bytes):
        return Media("image", decode(picture, source))
    if isinstance(picture, (str, Path)):
        path = expand(picture)
        if not is_file(path):
            raise DataError(f"{source}: image {shown(str(picture))} does not exist (looked in {Path.cwd()})")
        return Media("image", path)
    raise DataError(f"{source}: an image is a {type(picture).__name__}; give a PIL image or the path of a file")


def is_sound(path: Path) -> bool:
    """Whether the name of a file says that it is sound."""
    return path.suffix.lower() in AUDIO_SUFFIXES


def as_sound(sound: Any, source: Source) -> Media:
    """A sound as a part of a conversation.

    Args:
        sound: samples of one channel at 16 kHz (a float array), the path of a file, the bytes of one, or their base64,
            with or without a ``data:`` head.
        source: named in errors.

    Raises:
        DataError: there is no such file, or it is none of these.
    """
    if isinstance(sound, (np.ndarray, bytes)):
        return Media("audio", sound)
    if isinstance(sound, Path) or (isinstance(sound, str) and len(sound) < 4096 and not sound.startswith("data:")):
        path = expand(sound)
        if is_file(path):
            return Media("audio", path)
        if isinstance(sound, Path) or is_sound(path):
            raise DataError(f"{source}: audio {shown(str(sound))} does not exist (looked in {Path.cwd()})")
    if isinstance(sound, str):
        return Media("audio", _from_base64(sound, source))
    raise DataError(
        f"{source}: a sound is a {type(sound).__name__}; give samples at 16 kHz as a numpy array, or the path of a file"
    )


def _from_base64(text: str, source: Source) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2] if text.startswith("data:") else text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{source}: audio {text[:80]!r} is no file here and no base64 ({error})") from error


def as_video(video: Any, source: Source) -> Media:
    """A video as a part of a conversation.

    Args:
        video: the path of a file or of a folder of frames, or a list of the paths of frames.
        source: named in errors.

    Raises:
        DataError: there is no such file, or it is none of these.
    """
    if isinstance(video, (list, tuple)) and video and all(isinstance(frame, (str, Path)) for frame in video):
        return Media("video", tuple(_found(frame, source) for frame in video))
    if isinstance(video, (str, Path)):
        return Media("video", _found(video, source))
    raise DataError(f"{source}: a video is a {type(video).__name__}; give the path of a file, or those of its frames")


def _found(given: str | Path, source: Source) -> Path:
    path = expand(given)
    if not path.exists():
        raise DataError(f"{source}: video {str(given)[:200]!r} does not exist (looked in {Path.cwd()})")
    return path
