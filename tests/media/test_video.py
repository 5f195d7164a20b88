"""Length, size and chosen frames of videos of every kind, and what is said of files that are none."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from clips import number, picture, without_first_packets, write_clip

from finetune.media.video import Decoder, probe
from finetune.media.video_sampling import Clip, Length
from finetune.sample import DataError, Media
from finetune.utils.errors import UserError


def numbers(clip: Clip, indices: Sequence[int]) -> list[int]:
    with Decoder(clip) as decoder:
        return [number(decoder.take(index)) for index in indices]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "avi", "gif", "mov", "ts"])
def test_containers(tmp_path: Path, ending: str) -> None:
    clip = probe(Media("video", write_clip(tmp_path / f"a.{ending}")))
    assert (clip.length, clip.size) == (Length(12, 4.0), (64, 48))
    assert clip.length.duration == 3
    assert numbers(clip, range(12)) == list(range(12))
    assert numbers(clip, [2, 2, 9]) == [2, 2, 9]
    assert numbers(clip, [11, 3, 7, 0]) == [11, 3, 7, 0]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path: Path, ending: str) -> None:
    times = [0, 0.1, 0.2, 0.3, 1, 1.5, 1.6, 1.7, 2, 2.1, 2.2, 5]
    clip = probe(Media("video", write_clip(tmp_path / f"a.{ending}", times=times)))
    assert clip.length.frames == 12
    assert numbers(clip, [0, 3, 4, 8, 11]) == [0, 3, 4, 8, 11]


@pytest.mark.parametrize(("turn", "white"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (-90, (0, 1))])
def test_rotated(tmp_path: Path, turn: int, white: tuple[int, int]) -> None:
    """A corner that is white in the file is where the turn brings it."""
    path = write_clip(tmp_path / "a.mp4", 2, rotation=turn, marked=True)
    clip = probe(Media("video", path))
    assert clip.size == ((48, 64) if turn % 180 else (64, 48))
    with Decoder(clip) as decoder:
        shown = np.asarray(decoder.take(0)).astype(int).sum(2)
    assert shown.shape == clip.size[::-1]
    rows, columns = shown.shape[0] // 2, shown.shape[1] // 2
    corners = {
        (row, column): shown[row * rows :, column * columns :][:rows, :columns].mean()
        for row in (0, 1)
        for column in (0, 1)
    }
    assert max(corners, key=lambda corner: corners[corner]) == white


def test_sound_is_no_picture(tmp_path: Path) -> None:
    clip = probe(Media("video", write_clip(tmp_path / "a.mp4", sound=True)))
    assert numbers(clip, [0, 11]) == [0, 11]


def test_no_key_frame_at_the_start(tmp_path: Path) -> None:
    """The first of the frames is the first that can be decoded."""
    whole = write_clip(tmp_path / "whole.mkv")
    clip = probe(Media("video", without_first_packets(whole, tmp_path / "cut.mkv", 2)))
    found = numbers(clip, range(clip.length.frames))
    assert found == list(range(found[0], 12))
    assert found[0] > 2


def test_header_that_counts_frames_which_are_not_shown(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4")
    clip = probe(Media("video", without_first_packets(whole, tmp_path / "cut.mp4", 2)))
    assert clip.length.frames == 10
    assert numbers(clip, range(10)) == [4, 5, 6, 7, 8, 9, 10, 11, 11, 11]


def test_cut_short(tmp_path: Path) -> None:
    """What has its index at the end cannot be read; of others the frames that are there can."""
    for ending, frames in (("mp4", 0), ("gif", 8)):
        data = write_clip(tmp_path / f"whole.{ending}").read_bytes()
        path = tmp_path / f"cut.{ending}"
        path.write_bytes(data[: len(data) * 6 // 10])
        if frames:
            clip = probe(Media("video", path))
            assert numbers(clip, range(clip.length.frames)) == list(range(frames))
        else:
            with pytest.raises(DataError, match=r"^video .*cut.mp4 .*replace it or remove"):
                probe(Media("video", path))


def test_cut_short_behind_a_whole_header(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=4)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(12):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(index, (64, 48)))))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    with pytest.raises(DataError, match=r"^video .*a.mp4.*truncated"):  # noqa: PT012 - where it is seen is open
        clip = probe(Media("video", path))
        numbers(clip, range(12))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.mp4", b"hello\n"),
        ("list.mp4", b"ffconcat version 1.0\nfile 'whole.mp4'\n"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:9,\nwhole.ts\n#EXT-X-ENDLIST\n"),
    ],
)
def test_no_video(tmp_path: Path, name: str, content: bytes) -> None:
    write_clip(tmp_path / "whole.mp4")
    write_clip(tmp_path / "whole.ts")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^video \S*{name} .*not a video.*replace it or remove"):
        probe(Media("video", tmp_path / name))


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"a.mp4 is empty \(0 bytes\)"):
        probe(Media("video", tmp_path / "a.mp4"))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; correct the path"):
        probe(Media("video", tmp_path / "a.mp4"))


def test_too_large(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="64 x 48 = 3072 pixels, the limit is 3000"):
        probe(Media("video", write_clip(tmp_path / "a.mp4", 2)), max_pixels=3000)


def test_folder_and_list_of_pictures(tmp_path: Path) -> None:
    files = tuple(tmp_path / f"frame {index}.png" for index in range(12))
    for index, file in enumerate(files):
        picture(index, (30, 20)).save(file)
    (tmp_path / "notes.txt").write_text("no frame")
    folder = probe(Media("video", tmp_path), fps=2.0)
    assert (folder.length, folder.size) == (Length(12, 2.0), (30, 20))
    assert numbers(folder, [2, 10, 11]) == [2, 10, 11]
    assert numbers(probe(Media("video", files[:3])), [0, 2]) == [0, 2]
    with pytest.raises(DataError, match="has no images"):
        probe(Media("video", ()))
    picture(0, (31, 20)).save(tmp_path / "frame 12.png")
    with pytest.raises(DataError, match="frames of different sizes"):
        probe(Media("video", tmp_path))


def test_without_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, load = write_clip(tmp_path / "a.mp4", 2), builtins.__import__

    def lacking(name: str, *args: object, **more: object) -> object:
        if name.startswith("av"):
            raise ImportError(name)
        return load(name, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(UserError, match=r'pip install "av>=14,<19"') as missing:
        probe(Media("video", path))
    assert not isinstance(missing.value, DataError)
