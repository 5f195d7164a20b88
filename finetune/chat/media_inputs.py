"""Media of chat messages: images, audio and videos in memory, as files, or as base64."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.media.image_files import decode
from finetune.sample import AUDIO_SUFFIXES, DataError, Media
from finetune.utils.file_types import is_file
from finetune.utils.paths import expand
from finetune.utils.quoting import shown

ImageInput = Image.Image | Path | str | bytes
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


def from_base64(text: str | bytes) -> Image.Image:
    """The image encoded as base64, with or without a ``data:`` URI prefix.

    Raises:
        DataError: it is not base64, or not an image.
    """
    try:
        given = text.encode("ascii") if isinstance(text, str) else text
        data = base64.b64decode(given.rpartition(b",")[2] if given.startswith(b"data:") else given, validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise DataError(f"the image is not base64 ({error}); img2base64(path) makes it") from error
    return decode(data)


def as_media(image: ImageInput) -> Media:
    """An image as a part of a message.

    Raises:
        DataError: there is no such file, or the bytes are not an image.
    """
    if isinstance(image, Image.Image):
        return Media("image", image)
    if isinstance(image, bytes):
        return Media("image", decode(image))
    if isinstance(image, (str, Path)):
        path = expand(image)
        if not is_file(path):
            raise DataError(f"image {shown(str(image))} does not exist (looked in {Path.cwd()})")
        return Media("image", path)
    raise DataError(f"image of type {type(image).__name__}; give a PIL image or the path of a file")


def is_audio(path: Path) -> bool:
    """Whether the file name has the suffix of an audio file."""
    return path.suffix.lower() in AUDIO_SUFFIXES


def as_audio(audio: Any) -> Media:
    """Audio as a part of a message.

    Args:
        audio: mono samples at 16 kHz (a float array), the path of a file, the bytes of one, or their base64, with or
            without a ``data:`` URI prefix.

    Raises:
        DataError: there is no such file, or it is none of these.
    """
    if isinstance(audio, (np.ndarray, bytes)):
        return Media("audio", audio)
    if isinstance(audio, Path) or (isinstance(audio, str) and len(audio) < 4096 and not audio.startswith("data:")):
        path = expand(audio)
        if is_file(path):
            return Media("audio", path)
        if isinstance(audio, Path) or is_audio(path):
            raise DataError(f"audio {shown(str(audio))} does not exist (looked in {Path.cwd()})")
    if isinstance(audio, str):
        return Media("audio", _from_base64(audio))
    raise DataError(
        f"audio of type {type(audio).__name__}; give 16 kHz samples as a numpy array, or the path of a file"
    )


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2] if text.startswith("data:") else text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"audio {text[:80]!r} is neither a file nor base64 ({error})") from error


def as_video(video: Any) -> Media:
    """A video as a part of a message.

    Args:
        video: the path of a file or of a folder of frames, or a list of the paths of frames.

    Raises:
        DataError: there is no such file, or it is none of these.
    """
    if isinstance(video, (list, tuple)) and video and all(isinstance(frame, (str, Path)) for frame in video):
        return Media("video", tuple(_found(frame) for frame in video))
    if isinstance(video, (str, Path)):
        return Media("video", _found(video))
    raise DataError(f"video of type {type(video).__name__}; give the path of a file, or those of its frames")


def _found(given: str | Path) -> Path:
    path = expand(given)
    if not path.exists():
        raise DataError(f"video {str(given)[:200]!r} does not exist (looked in {Path.cwd()})")
    return path
