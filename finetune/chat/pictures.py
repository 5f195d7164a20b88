"""Pictures of a conversation: in memory, as files, or as base64."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from PIL import Image

from finetune.filetypes import is_file
from finetune.media.pictures import decode
from finetune.paths import expand
from finetune.quoting import shown
from finetune.sample import DataError, Media, Source

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
