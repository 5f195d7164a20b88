"""A video from its file to patches: ``python benchmarks/video.py [--decord PYTHON]``.

60 s of H.264 in 1920 x 1080 with a key frame every 250 frames, 64 frames of them, as MiniCPM-V 2.6 takes them (one by
one) and as 4.5 does (two in a group). Every side takes the same frames to patches of the same size:

* ours: what sample preparation does with a video, the patches as bytes;
* decord: as the model cards read a video, all frames in one batch, then each as the published image processor takes it;
* sequential: as LLaMA-Factory reads one with PyAV, every frame of the file decoded in turn and those kept that are
  wanted, then the same. Its reduction of frames to 256 x 256 pixels is left out.

The sides take turns, each in a process of its own; medians of the CPU time of all its threads, and of the wall time,
count. The pixels have to be those of the sequential side to the bit, and near those of decord, whose FFmpeg is another
one. PYTHON is that of an environment that has decord beside what the project needs. ``--clip`` measures another video.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1"}

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mix
import numpy as np
import torch
from official_samples import PATCH, RESOLUTION, TRANSFORM, fitted, unfolded
from PIL import Image
from results import Row, append

from finetune.encoding.encoder_settings import slicing_of
from finetune.encoding.pixel_inputs import INPUTS
from finetune.encoding.video_frames import decoded, expand_videos, plan_video, probe_video
from finetune.families import by_name
from finetune.media import image
from finetune.media.video_sampling import Length, VideoOptions
from finetune.sample import Media, Message, Sample, Source
from finetune.utils.malloc import keep_freed_memory

GOAL = 3.0
SIZE, SECONDS, RATE, KEY_FRAMES, FRAMES = (1920, 1080), 60, 25, 250, 64
FAMILIES = {
    "v2_6": VideoOptions(fps=2.0, max_frames=FRAMES, max_slice_nums=1),
    "v4_5": VideoOptions(fps=FRAMES / SECONDS, max_frames=FRAMES // 2, max_slice_nums=1),
}

Patches = np.ndarray | torch.Tensor | list[torch.Tensor]
"""Bytes (n, 3 * P * P); or, of the other sides, a tensor (3, P, n * P) of normalised values per frame."""
Prepared = tuple[Patches, Sequence[int]]
"""Patches, and the numbers of the frames that they are of."""


def write_clip(path: Path) -> None:
    """A camera that pans over a photo, and three things that move in front of it."""
    import av

    width, height = SIZE
    scene = np.asarray(mix.photo(width * 3 // 2, height * 3 // 2, 7))
    things = [np.asarray(mix.photo(height // 4, height // 4, seed)) for seed in range(3)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        assert isinstance(stream, av.VideoStream)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        stream.codec_context.gop_size = KEY_FRAMES
        for second in np.arange(SECONDS * RATE) / RATE:
            top, left = _place(scene.shape[:2], (height, width), second / 9, second / 7)
            picture = scene[top : top + height, left : left + width].copy()
            for number, thing in enumerate(things):
                angle = second * (number + 1)
                top, left = _place((height, width), thing.shape[:2], angle / 4 + 2 * number, angle / 3 + number)
                picture[top : top + len(thing), left : left + len(thing)] = thing
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _place(outer: Sequence[int], inner: Sequence[int], *angles: float) -> list[int]:
    """Where a rectangle that swings inside another one begins."""
    shares = [0.5 + 0.5 * np.sin(angle) for angle in angles]
    return [int(share * (outer[axis] - inner[axis])) for axis, share in enumerate(shares)]


def ours(clip: Path, family: str) -> Prepared:
    """Probing, sampling, decoding and cutting as the encoder does it."""
    model, options = by_name(family), FAMILIES[family]
    assert model.video is not None
    media, slicing = Media("video", clip), slicing_of(model, model.published.config, None)
    options = options.over(model.video.defaults(model.published.config))
    frames = probe_video(media, model.video, options, image.MAX_PIXELS)
    sample = Sample("0", Source("memory", 0), (Message("user", (media,)),))
    expanded = expand_videos(sample, [plan_video(frames, slicing, options)], "")
    patches, _ = INPUTS[model.inputs].cut(decoded(expanded, image.load, None), slicing)
    return patches, [index for group in frames.groups for index in group.indices]


def by_decord(clip: Path, family: str) -> Prepared:
    """As the model cards read a video."""
    from decord import VideoReader, cpu  # pyright: ignore[reportMissingImports]

    reader = VideoReader(str(clip), ctx=cpu(0))
    chosen = _chosen(family, len(reader), reader.get_avg_fps())
    return _as_published([Image.fromarray(frame) for frame in reader.get_batch(chosen).asnumpy()]), chosen


def sequential(clip: Path, family: str) -> Prepared:
    """As LLaMA-Factory reads a video."""
    import av

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        chosen = np.array(_chosen(family, stream.frames, float(stream.average_rate or 0)))
        container.seek(0)
        frames = [frame.to_image() for number, frame in enumerate(container.decode(stream)) if number in chosen]
    return _as_published(frames), chosen.tolist()


def _chosen(family: str, frames: int, rate: float) -> list[int]:
    rule = by_name(family).video
    assert rule is not None
    groups = rule.sample(Length(frames, rate), FAMILIES[family])
    return [index for group in groups for index in group.indices]


def _as_published(frames: Sequence[Image.Image]) -> list[torch.Tensor]:
    """Frames as the published image processor takes them: resized, normalised, cut by ``unfold``."""
    sized = [frame.resize(fitted(*frame.size, RESOLUTION), Image.Resampling.BICUBIC) for frame in frames]
    return [unfolded(torch.as_tensor(TRANSFORM(frame))) for frame in sized]


WAYS: dict[str, Callable[[Path, str], Prepared]] = {"ours": ours, "decord": by_decord, "sequential": sequential}


def once(way: str, clip: Path, family: str, file: str = "") -> dict[str, float]:
    """Prepares the video once; CPU and wall seconds.

    Args:
        way: one of ``WAYS``.
        clip: the video.
        family: of the model.
        file: where the pixels and the numbers of the frames are written; nowhere if empty.
    """
    clip.touch()  # what is known of a file in that state does not count
    cpu, wall = time.process_time(), time.perf_counter()
    made, chosen = WAYS[way](clip, family)
    taken = {"CPU time": time.process_time() - cpu, "wall time": time.perf_counter() - wall}
    if file:
        np.savez(file, pixels=_pixels(made), chosen=np.array(chosen))
    return taken


def _pixels(made: Patches) -> np.ndarray:
    """The patches as bytes (n, 3 * P * P), whichever side made them."""
    if not isinstance(made, list):
        return np.asarray(made)
    strips = torch.cat(made, dim=2).reshape(3, PATCH, -1, PATCH).permute(2, 0, 1, 3)
    return strips.mul(0.5).add(0.5).mul(255).round().to(torch.uint8).reshape(-1, 3 * PATCH**2).numpy()


class Side:
    """A way in a process of its own.

    Args:
        way: one of ``WAYS``.
        clip: the video.
        python: the interpreter.
    """

    def __init__(self, way: str, clip: Path, python: str = sys.executable) -> None:
        command = [python, __file__, "--side", way, "--clip", str(clip)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def once(self, family: str, file: str = "") -> dict[str, float]:
        """As the function ``once``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{family} {file}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended: {self._process.args}")
        return json.loads(line)


def _serve(way: str, clip: Path) -> int:
    keep_freed_memory()  # as our loader processes
    for line in sys.stdin:
        print(json.dumps(once(way, clip, *line.split())), flush=True)
    return 0


def compare(sides: dict[str, Any], family: str, folder: Path) -> None:
    """Ends the run where the sides do not take the same frames to the same pixels."""
    found = {}
    for way, side in sides.items():
        side.once(family, str(folder / f"{way}.npz"))
        found[way] = np.load(folder / f"{way}.npz")
    for way in set(found) - {"ours"}:
        assert found[way]["chosen"].tolist() == found["ours"]["chosen"].tolist(), way
        apart = np.abs(found[way]["pixels"].astype(np.int16) - found["ours"]["pixels"])
        frames = len(found["ours"]["chosen"])
        print(f"{family}, {frames} frames, {way}: {apart.mean():.4f} levels apart, {apart.max()} at most")
        assert apart.max() == 0 if way == "sequential" else apart.mean() < 2, way


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--decord", metavar="PYTHON", help="of an environment with decord; that side is left out without"
    )
    parser.add_argument("--clip", type=Path, help="a video to measure in place of the one that is made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--side", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    if given.side:
        return _serve(given.side, given.clip)
    with tempfile.TemporaryDirectory() as folder:
        clip = given.clip
        if clip is None:
            write_clip(clip := Path(folder) / "clip.mp4")
        sides = {"ours": Side("ours", clip), "sequential": Side("sequential", clip)}
        if given.decord:
            sides["decord"] = Side("decord", clip, given.decord)
        rows = [row for family in FAMILIES for row in _measured(sides, family, Path(folder), given.rounds)]
    for row in rows:
        print(f"{row[0]:<60} {row[1]:>8.3f} {row[2]:>8.3f} {row[3]:>6.2f}  {row[4]}")
    if not given.dry:
        append("video", rows, ["av", "torch", "pillow", "numpy"])
    return 0 if min(row[3] for row in rows) >= GOAL else 1


def _measured(sides: dict[str, Any], family: str, folder: Path, rounds: int) -> list[Row]:
    compare(sides, family, folder)
    times: dict[str, list[dict[str, float]]] = {way: [] for way in sides}
    for _ in range(rounds):
        for way, side in sides.items():
            times[way].append(side.once(family))
    rows: list[Row] = []
    for way in [way for way in sides if way != "ours"]:
        for what in ("CPU time", "wall time"):
            our, their = (statistics.median(each[what] for each in times[side]) for side in ("ours", way))
            rows.append((f"{what}, {family}, against {way}", our, their, their / our, "s"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
