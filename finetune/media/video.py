"""Video headers (``probe``) and decoding of chosen frames (``Decoder``), with PyAV.

A video is a video file, a folder of images, or a list of image files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from finetune.media import image
from finetune.media.video_file import (
    ENDS,
    FrameReader,
    NoFramesError,
    TruncatedError,
    check_bytes,
    check_index,
    index_of,
    opened,
)
from finetune.media.video_sampling import Clip, Length
from finetune.sample import DataError, Media
from finetune.utils.errors import UserError
from finetune.utils.file_types import is_folder, told

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

INSTALL = 'pip install "av>=14,<19"'

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
_FIX = "replace it or remove the record"


def probe(media: Media, fps: float = 1.0, max_pixels: int = image.MAX_PIXELS) -> Clip:
    """Length and frame size of a video; at most the first frame is decoded.

    Args:
        media: a video.
        fps: frames per second of videos that are image files.
        max_pixels: maximum number of pixels of a frame.

    Raises:
        DataError: no such file, not a video, no frames, or frames that are too large or of different sizes.
    """
    files = frame_files(media)
    if files is not None:
        sizes = {image.size(Media("image", file), max_pixels) for file in files}
        if len(sizes) > 1:
            listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:3])
            raise DataError(f"{media} has frames of different sizes ({listed}); resize them to one size")
        return Clip(files, Length(len(files), fps), sizes.pop(), from_images=True)
    if not isinstance(media.data, Path):
        raise DataError(f"{media} is not a video; give the path of a video file or of a folder of frames")
    with _errors(media):
        state = media.data.stat()
        clip = _probed(media.data, state.st_mtime_ns, state.st_size, state.st_ino, state.st_ctime_ns)
    width, height = clip.size
    if width * height > max_pixels:
        raise DataError(
            f"{media} has frames of {width} x {height} = {width * height} pixels, the limit is {max_pixels}; "
            "shrink the video, or raise --max_image_pixels if it is meant to be that large"
        )
    return clip


def check(media: Media) -> None:
    """Decodes a video to its last frame.

    Raises:
        DataError: as ``probe``, or a missing frame.
    """
    clip = probe(media)
    with Decoder(clip) as decoder:
        decoder.take(clip.length.frames - 1)


def frame_files(media: Media) -> tuple[Path, ...] | None:
    """The frames of a video that is a folder or a list of images; None for a video file.

    Raises:
        DataError: there are no frames.
    """
    if isinstance(media.data, tuple):
        found = media.data
    elif isinstance(media.data, Path) and is_folder(media.data):
        found = tuple(sorted((file for file in media.data.iterdir() if _is_image(file)), key=_natural))
    else:
        return None
    if not found:
        raise DataError(f"{media} has no images ({', '.join(_IMAGES)}) as video frames")
    return found


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _IMAGES and not file.name.startswith(".") and file.is_file()


def _natural(file: Path) -> list[tuple[int, str]]:
    """Natural sort key: frame 10 comes after frame 9."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in re.split(r"(\d+)", file.name)]


class Decoder:
    """Decodes chosen frames of a video in any order; ascending indices need one pass.

    Args:
        clip: the video.
        chosen: the frames that will be taken: others that they do not depend on are not decoded, and damage to those
            is not noticed. Empty if any may be taken.
    """

    def __init__(self, clip: Clip, chosen: Iterable[int] = ()) -> None:
        self._clip = clip
        self._chosen = tuple(chosen)
        self._media = Media("video", clip.files if clip.from_images else clip.files[0])
        self._reader: FrameReader | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()

    def take(self, index: int) -> Image.Image:
        """Frame ``index`` as RGB, with rotation applied.

        Raises:
            DataError: it cannot be decoded.
        """
        if self._clip.from_images:
            return image.load(Media("image", self._clip.files[index]))
        with _errors(self._media):
            if self._reader is None:
                self._reader = FrameReader(self._clip.files[0], self._chosen)
            frame = self._reader.at(index)
            if frame is None:
                raise DataError(
                    f"{self._media}: its header has {self._clip.length.frames} frames, but frame "
                    f"{index} is missing; the file is truncated or damaged: {_FIX}"
                )
            return _to_image(frame)


@lru_cache(maxsize=4096)
def _probed(file: Path, changed: int, size: int, *_: int) -> Clip:
    """Length and frame size of a video file; the other arguments identify its state for the cache."""
    container, stream = opened(file)
    try:
        check_bytes(stream, size)
        frames, fps = stream.frames, float(stream.average_rate or 0)
        if frames < 1 or fps <= 0 or ENDS & set(container.format.name.split(",")):
            index = index_of(container, stream)
            check_index(container, index)
            frames = frames if frames > 0 and fps > 0 else len(index.times)
            measured = frames / index.seconds if index.seconds > 0 else 0.0
            # Where the header has no rate, FFmpeg guesses it from the first packets.
            if measured and abs(fps - measured) > 0.01 * measured:
                fps = measured
    finally:
        container.close()
    container, stream = opened(file)  # not every stream can seek back
    try:
        # The rotation is known from a decoded frame only.
        first = next(container.decode(stream), None)
    finally:
        container.close()
    if first is None or frames < 1:
        raise NoFramesError
    return Clip((file,), Length(frames, fps or 1.0), _shown_size(first))


def _shown_size(frame: VideoFrame) -> tuple[int, int]:
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


def _to_image(frame: VideoFrame) -> Image.Image:
    """A frame as an RGB image; its rotation is in degrees counter-clockwise."""
    turn = _TURNS.get(frame.rotation % 360)
    rgb = image.from_pixels(frame.to_ndarray(format="rgba"))  # copied once less than from three bytes per pixel
    return rgb if turn is None else rgb.transpose(turn)


@contextmanager
def _errors(media: Media) -> Iterator[None]:
    """Turns decoding errors into DataError, and a missing PyAV into UserError."""
    try:
        from av.error import FFmpegError
    except ImportError as error:
        raise UserError(f"{media}: videos need PyAV: {INSTALL}") from error
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{media} does not exist; correct the path or remove the record") from error
    except TruncatedError as error:
        raise DataError(f"{media} {error}; the file is truncated or damaged: {_FIX}") from error
    except NoFramesError as error:
        what = _told(media) or f"has no video frame that can be decoded; {_FIX}"
        raise DataError(f"{media} {what}") from error
    except (FFmpegError, OSError, ValueError, EOFError, IndexError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        what = _told(media) or (
            f"cannot be decoded ({reason}); it is truncated, damaged or not a video (mp4, mkv, webm, avi, mov, gif): "
            f"{_FIX}"
        )
        raise DataError(f"{media} {what}") from error


def _told(media: Media) -> str | None:
    return told(media.data) if isinstance(media.data, Path) else None
