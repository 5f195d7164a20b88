"""Videos of a conversation: files, folders of frames, or lists of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.paths import expand
from finetune.sample import DataError, Media, Source


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
