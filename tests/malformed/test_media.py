"""Malformed pictures, sound and videos: each is refused by name, or taken as stated here; none starts a program."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
from clips import write_clip
from malformed_inputs import FOREIGN, PICTURES, guarded, mutated, picture, wav
from PIL import Image, ImageFile
from sounds import write_coded

from finetune.media import audio, image, image_files, video
from finetune.readers.record_media import media_folders, read_medium
from finetune.sample import DataError, Media, MediaKind

MUTATIONS = 25
MOST = 2_000_000


def see(file: Path | bytes) -> np.ndarray:
    """The pixels as training has them."""
    if isinstance(file, Path):
        media = Media("image", file)
        image.size(media, MOST)
    else:
        media = Media("image", image_files.decode(file))
    return np.asarray(image.load(media, MOST))


def watch(file: Path, *, whole: bool = False) -> None:
    clip = video.probe(Media("video", file), 1.0, MOST)
    with video.Decoder(clip) as decoder:
        last = min(clip.length.frames, 500) - 1
        for index in range(last + 1) if whole else (0, last // 2, last):
            decoder.take(index)


def hear(file: Path | bytes) -> None:
    audio.load(Media("audio", file))


@pytest.mark.parametrize("kind", PICTURES)
def test_damaged_pictures(kind: str, tmp_path: Path) -> None:
    whole, random = picture(kind), Random(kind)
    assert see(whole).shape[2] == 3
    escapes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(MUTATIONS):
            data = mutated(whole, random)
            (tmp_path / "a").write_bytes(data)
            name = f"{kind} {number} {data[:120]!r}"
            escapes.append(guarded(name, lambda: see(tmp_path / "a"), (DataError,)))
            escapes.append(guarded(name, lambda data=data: see(data), (DataError,)))
    assert [each for each in escapes if each] == []


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, KeyError, SyntaxError, EOFError, OverflowError])
def test_whatever_a_reader_of_pillow_raises(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(picture("PNG"))

    def fail(*_: object) -> None:
        raise error("inside of Pillow")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(DataError, match=r"^image \S*a.png cannot be decoded .*inside of Pillow"):
        see(tmp_path / "a.png")


def test_formats_that_start_a_program_or_have_no_pixels_are_not_read(tmp_path: Path) -> None:
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "photo.jpg").write_bytes(drawing)
    with pytest.raises(DataError, match=r"photo.jpg is a PostScript document: save it as PNG"):
        see(tmp_path / "photo.jpg")
    Image.init()
    assert set(image_files.FORMATS) <= set(Image.OPEN)
    assert not {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR"} & set(image_files.FORMATS)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


READ: dict[str, Callable[[Path], object]] = {"image": see, "audio": hear, "video": watch}


@pytest.mark.parametrize("medium", READ)
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_file(medium: str, kind: str, tmp_path: Path) -> None:
    content, words = FOREIGN[kind]
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{medium} \S*a.bin .*{words}"):
        READ[medium](tmp_path / "a.bin")


@pytest.mark.parametrize("medium", READ)
def test_empty_missing_folders_and_what_may_not_be_read(medium: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(bytes(1000))
    (tmp_path / "folder").mkdir()
    for name in ("empty", "zeros", "folder", "gone", "a" * 300, "a\0b"):
        with pytest.raises(DataError, match=f"^{medium}"):
            READ[medium](tmp_path / name)


def saved(values: np.ndarray, kind: str = "TIFF") -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
EIGHT = np.rint(RAMP * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 65535).astype(np.uint16),
        (RAMP * 16383).astype(np.uint16),
        (RAMP * 4095).astype(np.uint16),
        (RAMP * 1023).astype(np.uint16),
        EIGHT.astype(np.uint16),
        (RAMP * 65535).astype(np.int32),
        (RAMP * 4095).astype(np.int32),
        EIGHT.astype(np.int32),
        RAMP.astype(np.float32),
        (RAMP * 255).astype(np.float32),
    ],
    ids=["16", "14", "12", "10", "8 in 16", "16 in 32", "12 in 32", "8 in 32", "0 to 1", "0 to 255"],
)
def test_every_depth_from_black_to_white(values: np.ndarray) -> None:
    pixels = see(saved(values)).astype(int)
    assert np.abs(pixels - EIGHT[..., None].astype(int)).max() <= 1
    if values.dtype == np.uint16:
        assert (see(saved(values, "PNG")) == pixels).all()
    if values.dtype == np.float32:
        assert (see(saved(values, "PPM")) == pixels).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 4), -1, np.int32), "values from -1 to -1 of unknown range"),
        (np.full((4, 4), 65536, np.int32), "values from 65536 to 65536"),
        (np.full((4, 4), np.nan, np.float32), "not finite"),
        (np.full((4, 4), np.inf, np.float32), "not finite"),
        (np.full((4, 4), 255.5, np.float32), "float values from 255.5 to 255.5"),
        (np.full((4, 4), -0.5, np.float32), "float values from -0.5"),
    ],
)
def test_depths_whose_white_is_not_known(values: np.ndarray, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(saved(values))
    with pytest.raises(DataError, match=rf"a.tif has .*{words}.*; scale it to 8"):
        see(tmp_path / "a.tif")


def test_a_png_that_lacks_its_end(tmp_path: Path) -> None:
    whole = picture("PNG", (200, 200))
    for missing in (1, 4, 12, 20, 100):
        (tmp_path / "a.png").write_bytes(whole[:-missing])
        with pytest.raises(DataError, match="without IEND chunk"):
            image.size(Media("image", tmp_path / "a.png"))
        with pytest.raises(DataError, match="without IEND chunk"):
            see(whole[:-missing])
    (tmp_path / "a.png").write_bytes(whole + b"something behind it")
    see(tmp_path / "a.png")


def test_accepted_pictures() -> None:
    """JPEG has no checksum, and Pillow fills in what libjpeg cannot decode; unusual sides are no fault."""
    damaged = bytearray(picture("JPEG", (200, 200)))
    damaged[3000:3040] = bytes(40)
    assert see(bytes(damaged)).shape == (200, 200, 3)
    for size in ((1, 5000), (6000, 10), (3000, 1)):
        assert see(picture("PNG", size)).shape == (size[1], size[0], 3)
    profile = io.BytesIO()
    Image.new("RGB", (8, 8)).save(profile, "PNG", icc_profile=b"garbage")
    assert see(profile.getvalue()).shape == (8, 8, 3)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "m4a", "webm"])
def test_damaged_sound(suffix: str, tmp_path: Path) -> None:
    path, random, escapes = tmp_path / f"a.{suffix}", Random(suffix), []
    whole = wav() if suffix == "wav" else write_coded(path, 0.5).read_bytes()
    hear(whole)
    for number in range(20):
        data = mutated(whole, random)
        path.write_bytes(data)
        name = f"{suffix} {number} {data[:120]!r}"
        escapes.append(guarded(name, lambda: hear(path), (DataError,)))
        escapes.append(guarded(name, lambda data=data: hear(data), (DataError,)))
    assert [each for each in escapes if each] == []


def test_channels_are_counted_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hear(wav(8))
    monkeypatch.setattr(av, "open", None)
    (tmp_path / "a.wav").write_bytes(wav(9))
    for file in (tmp_path / "a.wav", wav(9)):
        with pytest.raises(DataError, match="has 9 channels, and at most 8 are read; mix it down"):
            hear(file)
    many = (9).to_bytes(2, "big")
    heads = (
        b"FORM\0\0\0\0AIFFCOMM\0\0\0\x12" + many + bytes(200),
        b".snd" + bytes(16) + (9).to_bytes(4, "big") + bytes(200),
        b"caff\0\1\0\0desc" + bytes(32) + (9).to_bytes(4, "big") + bytes(200),
        b"RIFX\0\0\0\0WAVEfmt \0\0\0\x10\0\1" + many + bytes(200),
    )
    for head in heads:
        with pytest.raises(DataError, match="has 9 channels"):
            hear(head)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "mov", "ts", "gif"])
def test_damaged_videos(suffix: str, tmp_path: Path) -> None:
    path, random, escapes = tmp_path / f"a.{suffix}", Random(suffix), []
    whole = write_clip(path, 6, size=(32, 32)).read_bytes()
    watch(path)
    for number in range(12):
        path.write_bytes(mutated(whole, random))
        escapes.append(guarded(f"{suffix} {number}", lambda: watch(path), (DataError,)))
    assert [each for each in escapes if each] == []


def faststart(source: Path, target: Path) -> Path:
    """The header in front, as files on the web have it: without their end they still open."""
    with av.open(str(source)) as given, av.open(str(target), "w", options={"movflags": "faststart"}) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    return target


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi"])
def test_videos_cut_at_the_end_are_told_without_decoding(suffix: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"whole.{suffix}", 40)
    path = faststart(path, tmp_path / "front.mp4") if suffix == "mp4" else path
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(
        DataError, match=r"(its header needs|the duration in its header|truncated packets).*truncated or damaged"
    ):
        video.probe(Media("video", path))


@pytest.mark.parametrize("suffix", ["mp4", "avi", "ts"])
def test_videos_damaged_inside_are_told(suffix: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"a.{suffix}", 40, size=(160, 120))
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 200] = Random(1).randbytes(200)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged"):
        watch(path, whole=True)


def test_the_smallest_video(tmp_path: Path) -> None:
    watch(write_clip(tmp_path / "a.mp4", 3, size=(2, 2)))


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_paths_and_embedded_bytes_of_every_kind(kind: MediaKind, tmp_path: Path) -> None:
    for value in ("x" * 5000, "a\x1b[31m", "\ud800", "~/a", "file://", "data:;base64,QUJD", "iVBORw0" * 40, "x" * 100):
        with pytest.raises(DataError) as caught:
            hear(read_medium(value, kind, kind, media_folders(tmp_path)).data)  # pyright: ignore[reportArgumentType] - bytes
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1500
