"""CPU time and memory of checking 100 000 records with an image each: ``python benchmarks/checking.py``.

Ours is ``python -m finetune check`` in a process of its own, with an empty cache and its start. Beside it: what any
check has to do, the same records read with json and the header of every image with Pillow, in one thread.
Figures go to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from results import append

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_SIZES = ((1344, 1008), (640, 480), (448, 448), (2000, 700), (900, 1600))
_GOAL_MS, _GOAL_MB = 1.2, 300.0
_WORDS = ("the", "a red", "small", "car", "dog on the table", "left of", "right of", "two", "three", "signs", "shows")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when time or memory misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--family", default="v2_6")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--read", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.read:
        return _read(Path(given.read))
    from finetune.tiny.checkpoint_writer import write_tiny_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _write(folder, given.records)
        base = write_tiny_checkpoint(given.family, folder / "base")
        check = [sys.executable, "-m", "finetune", "check", "--model", str(base), "--data"]
        ours, held = _measured([*check, str(data)], folder)
        few = folder / "few.json"
        few.write_text(json.dumps(json.loads(data.read_text())[:100]))
        start, before = _measured([*check, str(few)], folder)
        plain, _ = _measured([sys.executable, __file__, "--read", str(data)], folder)
    each, theirs = 1000 * ours / given.records, 1000 * plain / given.records
    size = f"check of {given.records} records, {given.family}"
    rows = [
        (f"CPU time, {size}", each, theirs, theirs / each, "ms per record, start included; json and Pillow alone"),
        (f"memory, {size}", held - before, before, before / max(held - before, 0.1), "MB more than for 100 records"),
    ]
    for case, one, other, ratio, unit in rows:
        print(f"{case:<50} {one:>10,.2f} {other:>10,.2f} {ratio:>8,.2f}  {unit}")
    print(f"start alone {start:.1f} s of CPU time")
    if not given.dry:
        append("checking", rows, ["pillow", "tokenizers"])
    return 0 if each <= _GOAL_MS and held - before <= _GOAL_MB else 1


def _measured(command: list[str], folder: Path) -> tuple[float, float]:
    """CPU seconds of a command with all its processes, and its largest memory in MB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, usage.ru_maxrss / 1024


def _read(file: Path) -> int:
    for record in json.loads(file.read_text(encoding="utf-8")):
        with Image.open(file.parent / record["image"]) as image:
            assert image.size in _SIZES
    return 0


def _write(folder: Path, records: int) -> Path:
    """Records of the official form, each with a file of its own: links to pictures of a few sizes."""
    chance = random.Random(0)
    (folder / "images").mkdir()
    originals = [folder / f"{number}.jpg" for number in range(20)]
    for number, path in enumerate(originals):
        Image.new("RGB", _SIZES[number % len(_SIZES)], (number, 90, 90)).save(path, quality=60)
    made = []
    for index in range(records):
        path = folder / "images" / f"{index}.jpg"
        os.link(originals[index % len(originals)], path)
        question = " ".join(chance.choices(_WORDS, k=chance.randint(4, 12))) + "?"
        answer = " ".join(chance.choices(_WORDS, k=chance.randint(2, 40)))
        turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
        made.append({"id": str(index), "image": f"images/{index}.jpg", "conversations": turns})
    data = folder / "data.json"
    data.write_text(json.dumps(made), encoding="utf-8")
    return data


if __name__ == "__main__":
    sys.exit(main())
