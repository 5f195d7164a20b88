"""Small video files made for tests: every frame is of one colour that tells its number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def colour(index: int) -> tuple[int, int, int]:
    """Far enough apart to survive compression, for up to 64 frames."""
    return (index % 4) * 80, (index // 4 % 4) * 80, (index // 16 % 4) * 80


def number(picture: Image.Image) -> int:
    """Which frame a picture is."""
    red, green, blue = (round(value / 80) for value in np.asarray(picture).reshape(-1, 3).mean(0))
    return red + 4 * green + 16 * blue


def picture(index: int, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, colour(index))


def write_clip(
    path: Path,
    frames: int = 12,
    *,
    fps: int = 4,
    size: tuple[int, int] = (64, 48),
    times: Sequence[float] | None = None,
    rotation: int = 0,
    sound: bool = False,
    codec: str | None = None,
    marked: bool = False,
) -> Path:
    """A video file.

    Args:
        path: where; its ending says which container.
        frames: their number.
        fps: frames per second.
        size: (width, height) as stored.
        times: second of every frame, where they are not evenly spaced.
        rotation: degrees against the clock by which players turn it.
        sound: whether it has a second of silence.
        codec: of the pictures; None for the usual one of the container.
        marked: whether the upper left quarter is white.
    """
    names = {".webm": "libvpx", ".avi": "mpeg4", ".gif": "gif"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or names.get(path.suffix, "libx264"), rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        stream.codec_context.gop_size = 5
        if path.suffix != ".gif":
            stream.bit_rate = 1_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        voice = container.add_stream("aac", rate=16_000) if sound else None
        for index in range(frames):
            pixels = np.array(picture(index, size))
            if marked:
                pixels[: size[1] // 2, : size[0] // 2] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if times is None else round(times[index] * 1000)
            frame.time_base = Fraction(1, fps) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if voice is not None:
            assert isinstance(voice, av.AudioStream)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16_000
            container.mux(voice.encode(silence))
            container.mux(voice.encode(None))
    return path


def without_first_packets(source: Path, target: Path, count: int) -> Path:
    """A copy that begins in the middle of a group of pictures."""
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for place, packet in enumerate(given.demux(given.streams.video[0])):
            if place >= count and packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    return target
