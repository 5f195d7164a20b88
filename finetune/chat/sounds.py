"""Sound of a conversation: samples in memory, files, or base64."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np

from finetune.filetypes import is_file
from finetune.paths import expand
from finetune.quoting import shown
from finetune.sample import SOUND_SUFFIXES, DataError, Media, Source


def is_sound(path: Path) -> bool:
    """Whether the name of a file says that it is sound."""
    return path.suffix.lower() in SOUND_SUFFIXES


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
