"""Frames that no chosen one depends on are not decoded, and those that are taken have the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from finetune.media.h264_packets import is_disposable, length_bytes
from finetune.media.video import Decoder, probe
from finetune.sample import DataError, Media

FRAMES, SIZE = 60, (160, 96)
CHOSEN = [0, 1, 2, 7, 19, 20, 24, 25, 26, 41, 58, 59]


def write_moving(path: Path, codec: str = "libx264", **options: str) -> Path:
    """Noise that moves, with a box that moves otherwise; key frames 25 frames apart."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    scene = np.asarray(Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        stream.codec_context.gop_size = 25
        for number in range(FRAMES):
            pixels = scene[number : number + SIZE[1], 3 * number : 3 * number + SIZE[0]].copy()
            pixels[20:50, 2 * number : 2 * number + 30] = 255 - 4 * number
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def taken(path: Path, chosen: Sequence[int], told: Sequence[int] = ()) -> list[np.ndarray]:
    with Decoder(probe(Media("video", path)), told) as decoder:
        return [np.asarray(decoder.take(index)) for index in chosen]


def skippable(packet: av.Packet) -> bool:
    """Whether no slice of an H.264 packet of an MP4 file belongs to a reference frame."""
    data, at, found = bytes(packet), 0, []
    while at < len(data):
        if data[at + 4] & 31 in (1, 5):
            found.append(data[at + 4] >> 5 & 3)
        at += 4 + int.from_bytes(data[at : at + 4], "big")
    return not any(found)


def spoilt(path: Path, target: Path, *, skippable_ones: bool) -> list[int]:
    """A copy with rubbish in place of the third packet of a kind; the numbers of the frames of that kind."""
    with av.open(str(path)) as given, av.open(str(target), "w") as made:
        source = given.streams.video[0]
        stream = made.add_stream_from_template(source)
        packets = [packet for packet in given.demux(source) if packet.pts is not None]
        times = sorted(packet.pts for packet in packets if packet.pts is not None)
        kind = [packet for packet in packets if not packet.is_keyframe and skippable(packet) == skippable_ones]
        for packet in packets:
            sent = packet
            if packet is kind[2]:
                head = b"\x01" if skippable_ones else b"\x61"
                sent = av.Packet(b"\0\0\0\x08" + head + b"rubbish")
                sent.pts, sent.dts, sent.duration = packet.pts, packet.dts, packet.duration
                sent.time_base = packet.time_base
            sent.stream = stream
            made.mux(sent)
    return [times.index(packet.pts) for packet in kind if packet.pts is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf": "0"},
        {"bf": "8", "b-pyramid": "none", "b_strategy": "0"},
        {"bf": "8", "b-pyramid": "strict", "b_strategy": "0"},
        {"bf": "4", "b-pyramid": "normal", "b_strategy": "0", "refs": "6"},
        {"x264-params": "open-gop=1:bframes=3:b-adapt=0"},
        {"x264-params": "interlaced=1:bframes=3:b-adapt=0"},
        {"x264-params": "intra-refresh=1:bframes=2:b-adapt=0"},
        {"x264-params": "slices=4:bframes=3:b-adapt=0:weightp=2"},
        {"profile": "baseline"},
    ],
    ids=str,
)
@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_pixels_are_those_of_all_frames_decoded(tmp_path: Path, ending: str, options: dict[str, str]) -> None:
    path = write_moving(tmp_path / f"a.{ending}", **options)
    every = taken(path, range(FRAMES))
    assert len({frame.tobytes() for frame in every}) == FRAMES
    for chosen in (CHOSEN, CHOSEN[::-1], [30], range(0, FRAMES, 7)):
        for index, frame in zip(chosen, taken(path, chosen, chosen), strict=True):
            assert np.array_equal(frame, every[index]), index


@pytest.mark.parametrize("codec", ["libx265", "mpeg4", "libvpx-vp9"])
def test_other_codecs(tmp_path: Path, codec: str) -> None:
    path = write_moving(tmp_path / "a.mkv", codec)
    every = taken(path, range(FRAMES))
    for index, frame in zip(CHOSEN, taken(path, CHOSEN, CHOSEN), strict=True):
        assert np.array_equal(frame, every[index]), index


def test_a_frame_that_was_not_announced(tmp_path: Path) -> None:
    path = write_moving(tmp_path / "a.mp4", bf="8", b_strategy="0")
    every = taken(path, range(FRAMES))
    order = [0, 20, 3, 21, 22, 40, 41]
    for index, frame in zip(order, taken(path, order, [0, 20, 40]), strict=True):
        assert np.array_equal(frame, every[index]), index


def test_damage_that_no_chosen_frame_depends_on(tmp_path: Path) -> None:
    """It is seen where the frame is taken, and where every frame may be."""
    path = write_moving(tmp_path / "a.mp4", bf="3", b_strategy="0")
    every = taken(path, range(FRAMES))
    kind = spoilt(path, tmp_path / "b.mp4", skippable_ones=True)
    chosen = [index for index in range(0, FRAMES, 6) if index != kind[2]]
    for index, frame in zip(chosen, taken(tmp_path / "b.mp4", chosen, chosen), strict=True):
        assert np.array_equal(frame, every[index]), index
    for told in ([kind[2]], []):
        with pytest.raises(DataError, match=r"b\.mp4.*damaged"):
            taken(tmp_path / "b.mp4", [kind[2]], told)


@pytest.mark.parametrize(
    ("heads", "disposable"),
    [
        ([0x01], True),
        ([0x06, 0x01, 0x01, 0x0C], True),
        ([0x09, 0x01], True),
        ([0x61], False),
        ([0x01, 0x21], False),
        ([0x67, 0x01], False),
        ([0x65], False),
        ([0x02], False),
        ([0x01, 0x14], False),
        ([0x06], False),
        ([], False),
    ],
)
def test_pictures_that_no_other_depends_on(heads: list[int], disposable: bool) -> None:
    units = [bytes([head, 0x88, 0x84]) for head in heads]
    by_length = b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)
    assert is_disposable(by_length, 4) == disposable
    assert is_disposable(b"".join(b"\0\0\0\1" + unit for unit in units), 0) == disposable
    assert not is_disposable(by_length + b"\0\0\0\x09\1", 4), "cut short"
    assert not is_disposable(by_length + b"\0", 4)


def test_bytes_of_a_length() -> None:
    assert length_bytes(bytes([1, 100, 0, 40, 0xFF, 0xE1])) == 4
    assert length_bytes(bytes([1, 100, 0, 40, 0xFD, 0xE1])) == 2
    assert length_bytes(b"\0\0\0\1\x67") == 0
    assert length_bytes(None) == 0


def test_damage_that_chosen_frames_depend_on(tmp_path: Path) -> None:
    path = write_moving(tmp_path / "a.mp4", bf="3", b_strategy="0")
    kind = spoilt(path, tmp_path / "b.mp4", skippable_ones=False)
    later = next(index for index in range(kind[2] + 1, FRAMES) if index not in kind)
    with pytest.raises(DataError, match=r"b\.mp4.*damaged"):
        taken(tmp_path / "b.mp4", [later], [later])
