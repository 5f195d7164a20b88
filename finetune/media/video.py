"""Video headers (``probe``) and decoding of chosen frames (``Decoder``), with PyAV.

A video is a video file, a folder of images, or a list of image files.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from finetune.media import image
from finetune.media.video_sampling import Clip, Length
from finetune.sample import DataError, Media
from finetune.utils.errors import UserError
from finetune.utils.file_types import is_folder, told

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

INSTALL = 'pip install "av>=14,<19"'

# Allowed containers. Playlists and patterns are excluded: they refer to other files or URLs.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg,apng",
    "protocol_whitelist": "file",
}
# Containers with a duration in the header that can still be read when truncated.
_ENDS = {"matroska", "webm", "avi"}
# Tolerance in seconds: durations are rounded, and the last frame may have none.
_SLACK = 0.5
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
    """

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._media = Media("video", clip.files if clip.from_images else clip.files[0])
        self._reader: _FrameReader | None = None

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
                self._reader = _FrameReader(self._clip.files[0])
            frame = self._reader.at(index)
            if frame is None:
                raise DataError(
                    f"{self._media}: its header has {self._clip.length.frames} frames, but frame "
                    f"{index} is missing; the file is truncated or damaged: {_FIX}"
                )
            return _to_image(frame)


class _FrameReader:
    """Random access to the frames of a file: decodes forward, or seeks to the key frame before the wanted one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._container, self._stream = _opened(file)
        self._index = _index(self._container, self._stream)
        _check_index(self._container, self._index)
        self._header_frames = self._stream.frames
        self._left: Iterator[VideoFrame] = iter(())
        self._current: VideoFrame | None = None
        self._now = -1
        self._rewind()

    def close(self) -> None:
        self._container.close()

    def at(self, number: int) -> VideoFrame | None:
        """Frame ``number``, None if there is no such frame."""
        index = self._index
        if number >= len(index.times):
            # Headers also count frames that are never displayed: before an edit or before the first key frame.
            if not index.times or index.packets < self._header_frames:
                return None
            number = len(index.times) - 1
        wanted = index.times[number]
        key = index.keys[max(bisect_right(index.keys, wanted) - 1, 0)]
        if self._current is None or not key <= self._now <= wanted:
            self._go_to(key, wanted)
        while self._current is not None and self._now < wanted:
            self._step()
        return self._current

    def _step(self) -> None:
        self._current = next(self._left, None)
        if self._current is not None:
            pts = self._current.pts
            self._now = self._now + 1 if self._index.counted or pts is None else pts
            # Frames before the first key frame lack their references and are not displayed.
            if self._current.is_corrupt and self._now >= self._index.times[0]:
                raise _TruncatedError(
                    f"is damaged: its frame at {self._current.time or 0:.2f} seconds cannot be decoded"
                )

    def _go_to(self, key: int, wanted: int) -> None:
        """Moves to a frame at or before the wanted one."""
        if self._index.counted or not self._sought(key):
            self._rewind()
            self._step()
            return
        self._step()
        if self._current is None or self._now > wanted:  # seeking is inexact in some containers
            self._rewind()
            self._step()

    def _sought(self, key: int) -> bool:
        from av.error import FFmpegError

        try:
            self._container.seek(key, stream=self._stream)
        except FFmpegError:
            return False
        self._left = self._container.decode(self._stream)
        return True

    def _rewind(self) -> None:
        """Restarts at the first frame by reopening the file: not every container can seek to its start."""
        self._container.close()
        self._container, self._stream = _opened(self._file)
        self._left = self._container.decode(self._stream)
        self._current, self._now = None, -1


@dataclass(frozen=True, slots=True)
class _Index:
    """The displayable frames of a file, from its packets.

    Attributes:
        times: time stamp of each, ascending; frame numbers if the file has no time stamps.
        keys: time stamps of key frames, ascending.
        counted: whether ``times`` are frame numbers.
        packets: number of all packets.
        seconds: from the first frame to the end of the last, 0 if unknown.
        end: end of the last packet of any stream in seconds, 0 if unknown.
        cut: whether a packet is truncated.
    """

    times: list[int]
    keys: list[int]
    counted: bool
    packets: int
    seconds: float
    end: float = 0.0
    cut: bool = False


def _index(container: InputContainer, stream: VideoStream) -> _Index:
    """The frames of a file, without decoding it."""
    packets, end, cut = [], 0.0, False
    for packet in container.demux():
        cut |= packet.is_corrupt
        if packet.size and packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.size and packet.stream_index == stream.index:
            packets.append(packet)
    begun = next((place for place, packet in enumerate(packets) if packet.is_keyframe), len(packets))
    usable = [packet for packet in packets[begun:] if not packet.is_discard]
    stamps = [packet.pts for packet in usable if packet.pts is not None]
    if len(stamps) < len(usable) or len(set(stamps)) < len(stamps):
        return _Index(list(range(len(usable))), [0], True, len(packets), 0.0, end, cut)
    # Frames displayed before the first key frame but stored after it cannot be decoded.
    shown = [packet for packet in usable if packet.pts >= stamps[0]]  # pyright: ignore[reportOptionalOperand]
    times = sorted(stamp for stamp in stamps if stamp >= stamps[0])
    keys = sorted(packet.pts for packet in shown if packet.is_keyframe and packet.pts is not None)
    seconds = 0.0
    if times and stream.time_base is not None:
        last = max(shown, key=lambda packet: packet.pts or 0)
        seconds = float((times[-1] + (last.duration or 0) - times[0]) * stream.time_base)
    return _Index(times, keys, False, len(packets), seconds, end, cut)


def _check_bytes(stream: VideoStream, size: int) -> None:
    """Checks that a file has the size that its sample table needs (MP4, MOV).

    Raises:
        _TruncatedError: it is shorter.
    """
    ends = [entry.pos + entry.size for entry in getattr(stream, "index_entries", ()) or ()]  # PyAV 14 has none
    if ends and max(ends) > size:
        raise _TruncatedError(f"has {size} bytes, its header needs {max(ends)}")


def _check_index(container: InputContainer, index: _Index) -> None:
    """Checks that the packets of a file reach the duration in its header.

    Raises:
        _TruncatedError: they end earlier, or one of them is damaged.
    """
    if index.cut:
        raise _TruncatedError("has truncated packets")
    duration = (container.duration or 0) / 1_000_000
    if _ENDS & set(container.format.name.split(",")) and index.end and index.end < duration - _SLACK:
        raise _TruncatedError(f"ends after {index.end:.2f} seconds, the duration in its header is {duration:.2f}")


@lru_cache(maxsize=4096)
def _probed(file: Path, changed: int, size: int, *_: int) -> Clip:
    """Length and frame size of a video file; the other arguments identify its state for the cache."""
    container, stream = _opened(file)
    try:
        _check_bytes(stream, size)
        frames, fps = stream.frames, float(stream.average_rate or 0)
        if frames < 1 or fps <= 0 or _ENDS & set(container.format.name.split(",")):
            index = _index(container, stream)
            _check_index(container, index)
            frames = frames if frames > 0 and fps > 0 else len(index.times)
            measured = frames / index.seconds if index.seconds > 0 else 0.0
            # Where the header has no rate, FFmpeg guesses it from the first packets.
            if measured and abs(fps - measured) > 0.01 * measured:
                fps = measured
    finally:
        container.close()
    container, stream = _opened(file)  # not every stream can seek back
    try:
        # The rotation is known from a decoded frame only.
        first = next(container.decode(stream), None)
    finally:
        container.close()
    if first is None or frames < 1:
        raise _NoFramesError
    return Clip((file,), Length(frames, fps or 1.0), _shown_size(first))


class _TruncatedError(Exception):
    """A truncated or damaged file; the message has the reason."""


class _NoFramesError(Exception):
    """A file without a displayable video frame."""


def _opened(file: Path) -> tuple[InputContainer, VideoStream]:
    """A container and its video stream; cover images of audio files do not count."""
    import av
    from av.stream import Disposition

    container = av.open(str(file), options=_OPTIONS)
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    # Without a supported codec there is no decoder.
    streams = [stream for stream in streams if stream.codec_context is not None]
    if not streams:
        container.close()
        raise _NoFramesError
    return container, streams[0]


def _shown_size(frame: VideoFrame) -> tuple[int, int]:
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


def _to_image(frame: VideoFrame) -> Image.Image:
    """A frame as an RGB image; its rotation is in degrees counter-clockwise."""
    turn = _TURNS.get(frame.rotation % 360)
    rgb = Image.fromarray(frame.to_ndarray(format="rgb24"))
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
    except _TruncatedError as error:
        raise DataError(f"{media} {error}; the file is truncated or damaged: {_FIX}") from error
    except _NoFramesError as error:
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
