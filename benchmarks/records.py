"""Loading a million records, json.load against the index: ``python benchmarks/records.py``.

Writes the records into a temporary folder (about 0.4 GB), and appends its figures to benchmarks/results.csv. Opening is
measured in fresh processes with an empty cache folder of their own; private memory is what the pages of a process that
no other shares grow by (Linux, /proc/self/smaps_rollup).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from results import append

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_WORDS = ("the", "a red", "small", "car", "dog on the table", "left of", "right of", "two", "three", "signs", "shows")
_REACHED = 20_000


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures; 1 when reopening or memory misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.measure:
        print(json.dumps(_MEASURES[given.measure[0]](Path(given.measure[1]))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        rows = []
        for kind in ("json", "jsonl"):
            file = Path(folder) / f"data.{kind}"
            _write(file, given.records)
            rows += _compare(file, given.records)
            file.unlink()
    for case, ours, theirs, ratio, unit in rows:
        print(f"{case:<40} {ours:>12,.4f} {theirs:>12,.4f} {ratio:>10,.2f}  {unit}")
    if not given.dry:
        append("records", rows, ["datasets", "numpy"])
    reopening = min(row[3] for row in rows if "reopening" in row[0])
    memory = max(row[1] for row in rows if "private memory" in row[0])
    return 0 if reopening >= 100 and memory < 50 else 1


def _compare(file: Path, records: int) -> Iterator[tuple[str, float, float, float, str]]:
    """Rows of one file: case, ours, theirs, ratio, unit."""
    theirs = _fresh("whole", file)
    first, again = _fresh("open", file), _fresh("open", file)
    size = f"{records} records, {file.stat().st_size / 1e6:.0f} MB {file.suffix[1:]}"
    load = theirs["seconds"]
    yield f"first opening, {size}", first["seconds"], load, load / first["seconds"], "s, json.load / ours"
    yield f"reopening, {size}", again["seconds"], load, load / again["seconds"], "s, json.load / ours"
    ours, held = again["private"], theirs["private"]
    yield f"private memory, {size}", ours, held, held / max(ours, 0.01), "MB after random access"
    yield f"private memory while indexing, {size}", first["peak"], theirs["peak"], theirs["peak"] / first["peak"], "MB"
    rate, plain = again["rate"], theirs["rate"]
    yield f"random access, {size}", rate, plain, rate / plain, "records/s; theirs are in memory"


def _fresh(what: str, file: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, str(file)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _opened(file: Path) -> dict[str, float]:
    from finetune.readers.mixture import open_data

    # As training opens it, form of the records included; a record is parsed when it is reached.
    return _measured(lambda: open_data(file, None), lambda data, index: data.record(index))


def _whole(file: Path) -> dict[str, float]:
    def load() -> list[Any]:
        with file.open(encoding="utf-8") as text:
            return json.load(text) if file.suffix == ".json" else [json.loads(line) for line in text]

    return _measured(load, lambda records, index: records[index])


_MEASURES = {"open": _opened, "whole": _whole}


def _measured(load: Callable[[], Any], reach: Callable[[Any, int], Any]) -> dict[str, float]:
    before = _private()
    start = time.perf_counter()
    records = load()
    seconds = time.perf_counter() - start
    peak = _status("VmHWM") - _status("RssFile")
    chosen = random.Random(0).choices(range(len(records)), k=_REACHED)
    start = time.perf_counter()
    for index in chosen:
        reach(records, index)
    rate = len(chosen) / (time.perf_counter() - start)
    return {"seconds": seconds, "private": _private() - before, "peak": peak - before, "rate": rate}


def _private() -> float:
    """Memory of this process that no other shares, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _write(file: Path, records: int) -> None:
    """Records of the official form, of different lengths, some with several turns and some not English."""
    chance = random.Random(0)
    array = file.suffix == ".json"
    with file.open("w", encoding="utf-8") as target:
        for index in range(records):
            lead = ("[\n" if index == 0 else ",\n") if array else ""
            target.write(f"{lead}{json.dumps(_record(index, chance), ensure_ascii=False)}{'' if array else chr(10)}")
        target.write("\n]\n" if array else "")


def _record(index: int, chance: random.Random) -> dict[str, Any]:
    turns = []
    for turn in range(chance.choice((1, 1, 1, 2, 3))):
        question = " ".join(chance.choices(_WORDS, k=chance.randint(4, 12))) + "?"
        answer = " ".join(chance.choices(_WORDS, k=chance.randint(2, 40)))
        turns.append({"role": "user", "content": ("<image>\n" if turn == 0 else "") + question})
        turns.append({"role": "assistant", "content": answer if index % 10 else "图中有一只小狗。" + answer})
    return {"id": str(index), "image": f"images/{index % 1000:03}/{index}.jpg", "conversations": turns}


if __name__ == "__main__":
    sys.exit(main())
