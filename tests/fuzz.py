"""Feeds damaged records, data files, pictures, sizes, sound and videos to what reads them, until the time is over.

    python tests/fuzz.py --minutes 10

Anything that ends in an exception other than UserError, ends the process, or takes longer than 20 seconds is an escape:
its input is saved, its seed printed, and the exit status is 1. The inputs run in a process of their own. To see one
input again: ``--seed S --only N``.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from malformed_inputs import PICTURES, changed, json_texts, mutated, picture, records, wav

_SLOW = 20.0
# Seconds that imports may take.
_STARTING = 120.0
_MOST = 1_000_000


def main(argv: list[str] | None = None) -> int:
    """Runs for a while; 1 when anything escaped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="default: a new one, which is printed")
    parser.add_argument("--only", type=int, metavar="N", help="input number N alone, in this process")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("fuzz-escapes"), help="folder for inputs that escape")
    parser.add_argument("--child", type=int, metavar="N", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    seed = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    if given.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            run(seed, given.only, given.kinds, Path(folder))
        return 0
    if given.child is not None:
        return child(seed, given.child, given.kinds, Path.cwd())
    print(f"seed {seed}", flush=True)
    return parent(seed, given.kinds, given.minutes, given.out)


def parent(seed: int, kinds: list[str], minutes: float, out: Path) -> int:
    """Keeps a child at work, and reports what it does not survive."""
    end, number, escapes = time.monotonic() + 60 * minutes, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while time.monotonic() < end:
            words = ["--seed", str(seed), "--child", str(number), "--kinds", *kinds]
            environment = os.environ | {"XDG_CACHE_HOME": name, "PYTHONPATH": os.pathsep.join(sys.path)}
            (folder / "number").unlink(missing_ok=True)
            with (folder / "log").open("w") as log:
                command = [sys.executable, "-X", "faulthandler", str(Path(__file__).resolve()), *words]
                worker = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
                why = watched(worker, folder, end)
            number = int((folder / "number").read_text()) if (folder / "number").is_file() else number
            if why is not None:
                escapes += 1
                print(
                    f"ESCAPE: --seed {seed} --only {number}: {why}\n{(folder / 'log').read_text()[-3000:]}", flush=True
                )
                save(folder, out / f"{seed}-{number}")
            number += 1
    print(f"{number} inputs, {escapes} escapes" + (f", saved in {out}" if escapes else ""), flush=True)
    return 1 if escapes else 0


def watched(worker: subprocess.Popen[Any], folder: Path, end: float) -> str | None:
    """Waits for a child; what went wrong with it, None where only the time is over."""
    seen, since = "", time.monotonic()
    while worker.poll() is None:
        time.sleep(0.05)
        now = (folder / "number").read_text() if (folder / "number").is_file() else ""
        if now != seen:
            seen, since = now, time.monotonic()
        slow = time.monotonic() - since > (_SLOW if seen else _STARTING)
        if slow or time.monotonic() > end:
            worker.kill()
            worker.wait()
            return f"took longer than {_SLOW:g} seconds" if slow else None
    return f"the process ended with {worker.returncode}"


def save(folder: Path, to: Path) -> None:
    """Keeps the input of an escape."""
    to.mkdir(parents=True, exist_ok=True)
    for file in (each for each in folder.iterdir() if each.is_file()):
        (to / file.name).write_bytes(file.read_bytes())


def child(seed: int, number: int, kinds: list[str], folder: Path) -> int:
    """Feeds one input after another; ends at the first that escapes."""
    if "record" in kinds:
        encoder()
    while True:
        (folder / "next").write_text(str(number))
        (folder / "next").replace(folder / "number")  # the parent never reads half of it
        try:
            run(seed, number, kinds, folder)
        except Exception:  # noqa: BLE001 - any exception that gets here is what is looked for
            traceback.print_exc()
            return 1
        number += 1


def run(seed: int, number: int, kinds: list[str], folder: Path) -> None:
    """One input; UserError is how it should end."""
    from finetune.utils.errors import UserError

    random = Random(f"{seed} {number}")
    warnings.simplefilter("ignore")
    try:
        KINDS[random.choice(kinds)](random, folder)
    except UserError as error:
        message = str(error)
        message.encode()
        assert "\x1b" not in message, "a control character in a message"
        assert len(message) < 5000, "a long message"


@cache
def encoder() -> Any:
    """Tokens and slices of a small generation."""
    from golden_tokenizers import SMALL_IMAGES, tokenizer

    from finetune.encoding.encoder import Encoder
    from finetune.families import by_name

    made = Encoder(by_name("llama3_v2_5"), tokenizer("llama3"), SMALL_IMAGES, max_length=500)
    made.refuse_above_pixels = _MOST
    return made


def some_record(random: Random, folder: Path) -> None:
    """Records of a form with other values, read, and encoded by a policy for long ones."""
    from finetune.encoding.length_policy import POLICIES, LengthPolicy
    from finetune.readers import read
    from finetune.utils.errors import UserError

    form, good = random.choice(list(records(folder).items()))
    path = folder / "data.json"
    path.write_text(json.dumps([changed(good, random) for _ in range(random.randrange(1, 5))]))
    samples = read(path, strict_paths=random.random() < 0.3)
    length_policy = LengthPolicy(encoder(), random.choice(POLICIES))
    for index in range(len(samples)):
        try:
            length_policy.encode(samples[index])
        except UserError as error:
            str(error).encode()
    assert form


def some_bytes(random: Random, folder: Path) -> None:
    """A data file with other bytes, read at random and from front to back."""
    from finetune.readers import read
    from finetune.readers.streamed_samples import open_stream
    from finetune.utils.errors import UserError

    texts = [json.dumps(record).encode() for record in records(folder).values()]
    texts += json_texts().values()
    path = folder / random.choice(("data.json", "data.jsonl", "data.csv"))
    data = random.choice(
        (b"[" + random.choice(texts) + b"]", b"\n".join(random.choices(texts, k=3)), random.choice(texts))
    )
    path.write_bytes(mutated(data, random) if random.random() < 0.8 else data)
    try:
        samples = read(path)
        for index in range(len(samples)):
            samples.source(index)
            guarded_item(samples, index)
    except UserError:
        if path.suffix == ".csv":
            raise
    if path.suffix != ".csv":
        stream = open_stream(path, None)
        for record in stream.stream.one_pass(0, 0, 1):
            stream.sample(record)


def guarded_item(samples: Any, index: int) -> None:
    """A sample, or its error."""
    from finetune.utils.errors import UserError

    try:
        samples[index]
    except UserError as error:
        str(error).encode()


def some_picture(random: Random, folder: Path) -> None:
    """A picture of any format with other bytes, from a file and from memory, by either way of decoding."""
    import numpy as np

    from finetune.media import fast_image, image, image_files
    from finetune.sample import Media

    kind = random.choice(list(PICTURES))
    size = random.choice(((24, 16), (1, 1), (1, 90), (90, 1), (64, 64)))
    data = mutated(whole_picture(kind, size), random)
    (folder / "input").write_bytes(data)
    reader = random.choice((image.left_to_pillow, fast_image.read))
    for media in (Media("image", folder / "input"), Media("image", image_files.decode(data))):
        image.size(media, _MOST)
        assert np.asarray(image.load(media, _MOST, reader)).shape[2] == 3


@cache
def whole_picture(kind: str, size: tuple[int, int]) -> bytes:
    """A picture as it was before; formats with sides of their own are larger."""
    return picture(kind, size)


def some_size(random: Random, folder: Path) -> None:
    """A plan for pictures of any size: what it promises holds."""
    from finetune.media.slicing import SliceSpec, crop_boxes, item_sizes, plan

    side = [random.choice((1, 2, 13, 448, 10**4, random.randrange(1, 10**5))) for _ in range(2)]
    spec = SliceSpec(random.randrange(1, 20), random.choice((56, 448, 980)), 14)
    (folder / "input").write_text(f"{side} {spec}")
    made = plan(side[0], side[1], spec)
    sizes = item_sizes(made)
    assert 1 <= len(sizes) <= 1 + spec.max_slice_nums
    assert all(width % 14 == height % 14 == 0 and min(width, height) > 0 for width, height in sizes)
    if made.refined is not None:
        assert all(left < right and top < bottom for left, top, right, bottom in crop_boxes(made))


def some_sound(random: Random, folder: Path) -> None:
    """Sound of any coding with other bytes."""
    from finetune.media import audio
    from finetune.sample import Media

    suffix = random.choice(("wav", "flac", "mp3", "ogg", "m4a", "webm"))
    data = mutated(whole_sound(suffix, random.choice((1, 2, 8))), random)
    (folder / "input").write_bytes(data)
    audio.load(Media("audio", folder / "input" if random.random() < 0.5 else data))


@cache
def whole_sound(suffix: str, channels: int) -> bytes:
    """Sound as it was before."""
    from sounds import write_coded

    if suffix == "wav":
        return wav(channels)
    with tempfile.TemporaryDirectory() as folder:
        return write_coded(Path(folder) / f"a.{suffix}", 0.4).read_bytes()


def some_video(random: Random, folder: Path) -> None:
    """A short video of any container with other bytes, its first, middle and last frame."""
    from finetune.media import video
    from finetune.sample import Media

    data = mutated(whole_video(random.choice(("mp4", "mkv", "webm", "avi", "mov", "ts", "gif"))), random)
    (folder / "input").write_bytes(data)
    clip = video.probe(Media("video", folder / "input"), 1.0, _MOST)
    last = min(clip.length.frames, 200) - 1
    with video.Decoder(clip) as decoder:
        for index in {0, last // 2, last}:
            decoder.take(index)


@cache
def whole_video(suffix: str) -> bytes:
    """A video as it was before."""
    from clips import write_clip

    with tempfile.TemporaryDirectory() as folder:
        return write_clip(Path(folder) / f"a.{suffix}", 7, size=(48, 32), sound=suffix in ("mp4", "mkv")).read_bytes()


KINDS: dict[str, Callable[[Random, Path], None]] = {
    "record": some_record,
    "bytes": some_bytes,
    "picture": some_picture,
    "size": some_size,
    "sound": some_sound,
    "video": some_video,
}


if __name__ == "__main__":
    sys.exit(main())
