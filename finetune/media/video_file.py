"""Random access to the frames of a video file with PyAV: opening, the index of its frames, decoding."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.media import h264_packets

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Allowed containers. Playlists and patterns are excluded: they refer to other files or URLs.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg,apng",
    "protocol_whitelist": "file",
}
# Containers with a duration in the header that can still be read when truncated.
ENDS = {"matroska", "webm", "avi"}
# Tolerance in seconds: durations are rounded, and the last frame may have none.
_SLACK = 0.5
# Frames that are decoded at once. Every one more is decoded in vain at a jump, and is memory of its own.
_THREADS = 4


class TruncatedError(Exception):
    """A truncated or damaged file; the message has the reason."""


class NoFramesError(Exception):
    """A file without a displayable video frame."""


def opened(file: Path) -> tuple[InputContainer, VideoStream]:
    """A container and its video stream; cover images of audio files do not count."""
    import av
    from av.stream import Disposition

    container = av.open(str(file), options=_OPTIONS)
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    # Without a supported codec there is no decoder.
    streams = [stream for stream in streams if stream.codec_context is not None]
    if not streams:
        container.close()
        raise NoFramesError
    context = streams[0].codec_context
    context.thread_type, context.thread_count = "FRAME", min(len(os.sched_getaffinity(0)), _THREADS)
    return container, streams[0]


class FrameReader:
    """Random access to the frames of a file: decodes forward, or seeks to the key frame before the wanted one.

    Args:
        file: the video file.
        chosen: the frames that will be asked for; of the others only those are decoded that later frames may depend
            on. Empty if any may be asked for.
    """

    def __init__(self, file: Path, chosen: Iterable[int] = ()) -> None:
        self._file = file
        self._container, self._stream = opened(file)
        self._index = index_of(self._container, self._stream)
        check_index(self._container, self._index)
        self._header_frames = self._stream.frames
        self._left: Iterator[VideoFrame] = iter(())
        self._current: VideoFrame | None = None
        self._now = -1
        times = self._index.times
        self._chosen = frozenset(times[number] for number in chosen if number < len(times))
        codec = self._stream.codec_context
        self._skips = bool(self._chosen) and not self._index.counted and codec.name == "h264"
        self._lengths = h264_packets.length_bytes(codec.extradata)
        self._rewind()

    def close(self) -> None:
        """Closes the file."""
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
        if self._skips and (frame := self._skipping_to(wanted)) is not None:
            return frame
        return self._forward_to(wanted)

    def _skipping_to(self, wanted: int) -> VideoFrame | None:
        """The frame of exactly that time stamp; None, and nothing is skipped from now on, if it does not come."""
        try:
            frame = self._forward_to(wanted) if wanted in self._chosen else None
        except TruncatedError:
            frame = None
        # The two fields of an interlaced frame may be packets with time stamps of their own.
        if frame is not None and frame.pts == wanted and not frame.interlaced_frame:
            return frame
        self._skips, self._current = False, None
        return None

    def _forward_to(self, wanted: int) -> VideoFrame | None:
        """The first frame at or after a time stamp, None if there is none."""
        keys = self._index.keys
        key = keys[max(bisect_right(keys, wanted) - 1, 0)]
        if self._current is None or not key <= self._now <= wanted:
            self._go_to(key, wanted)
        while self._current is not None and self._now < wanted:
            self._step()
        return self._current

    def _decoded(self) -> Iterator[VideoFrame]:
        """The frames from the current position of the file on, without those that are skipped."""
        for packet in self._container.demux(self._stream):
            if not self._skips or packet.pts in self._chosen or not self._is_disposable(packet):
                yield from packet.decode()

    def _is_disposable(self, packet: Packet[VideoStream]) -> bool:
        return packet.size > 0 and h264_packets.is_disposable(bytes(packet), self._lengths)

    def _step(self) -> None:
        self._current = next(self._left, None)
        if self._current is not None:
            pts = self._current.pts
            self._now = self._now + 1 if self._index.counted or pts is None else pts
            # Frames before the first key frame lack their references and are not displayed.
            if self._current.is_corrupt and self._now >= self._index.times[0]:
                raise TruncatedError(
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
        self._left = self._decoded()
        return True

    def _rewind(self) -> None:
        """Restarts at the first frame by reopening the file: not every container can seek to its start."""
        self._container.close()
        self._container, self._stream = opened(self._file)
        self._left = self._decoded()
        self._current, self._now = None, -1


@dataclass(frozen=True, slots=True)
class FrameIndex:
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


def index_of(container: InputContainer, stream: VideoStream) -> FrameIndex:
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
        return FrameIndex(list(range(len(usable))), [0], True, len(packets), 0.0, end, cut)
    # Frames displayed before the first key frame but stored after it cannot be decoded.
    shown = [packet for packet in usable if packet.pts >= stamps[0]]  # pyright: ignore[reportOptionalOperand]
    times = sorted(stamp for stamp in stamps if stamp >= stamps[0])
    keys = sorted(packet.pts for packet in shown if packet.is_keyframe and packet.pts is not None)
    seconds = 0.0
    if times and stream.time_base is not None:
        last = max(shown, key=lambda packet: packet.pts or 0)
        seconds = float((times[-1] + (last.duration or 0) - times[0]) * stream.time_base)
    return FrameIndex(times, keys, False, len(packets), seconds, end, cut)


def check_bytes(stream: VideoStream, size: int) -> None:
    """Checks that a file has the size that its sample table needs (MP4, MOV).

    Raises:
        TruncatedError: it is shorter.
    """
    ends = [entry.pos + entry.size for entry in getattr(stream, "index_entries", ()) or ()]  # PyAV 14 has none
    if ends and max(ends) > size:
        raise TruncatedError(f"has {size} bytes, its header needs {max(ends)}")


def check_index(container: InputContainer, index: FrameIndex) -> None:
    """Checks that the packets of a file reach the duration in its header.

    Raises:
        TruncatedError: they end earlier, or one of them is damaged.
    """
    if index.cut:
        raise TruncatedError("has truncated packets")
    duration = (container.duration or 0) / 1_000_000
    if ENDS & set(container.format.name.split(",")) and index.end and index.end < duration - _SLACK:
        raise TruncatedError(f"ends after {index.end:.2f} seconds, the duration in its header is {duration:.2f}")
