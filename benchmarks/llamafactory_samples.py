"""Sample preprocessing, this toolkit against LLaMA-Factory: ``python benchmarks/llamafactory_samples.py PYTHON FILE``.

PYTHON is that of an environment with ``pip install llamafactory``; FILE is image_processing_minicpmv.py of a published
MiniCPM-V 2.6, which LLaMA-Factory runs twice for every image. The mix of samples.py, for MiniCPM-V 2.6, both sides with
LLaMA-Factory's image_max_pixels of 768 x 768; from files to a batch of one. The sides take turns, sample by sample,
each in a process with one thread; of the CPU time of every sample the median of the rounds counts. Ids, places and
sizes have to be the same, and so have the pixels to a twentieth of a level on the average (its Pillow is another one).
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mix
import numpy as np
import torch
from llamafactory_side import MAX_PIXELS
from official_samples import strips
from results import append
from tokenizers import AddedToken

from dataset import DataCollator, SupervisedDataset
from finetune.encoding.encoder import Encoder
from finetune.families import by_name
from finetune.readers.mixture import open_data
from finetune.utils.malloc import keep_freed_memory

CONFIG = mix.CONFIG | {"version": 2.6, "query_num": 64}
_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image_id>", "</image_id>")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints and appends the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of an environment with LLaMA-Factory")
    parser.add_argument("processor", type=Path, help="the published image_processing_minicpmv.py")
    parser.add_argument("--rounds", type=int, default=9, help="times that every sample is prepared")
    parser.add_argument("--dry", action="store_true", help="append nothing to results.csv")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        numbers = mix.write(folder)
        tokenizer = mix.tokenizer()
        tokenizer.pad_token = "<unk>"
        added: Any = [AddedToken(token, normalized=False, special=True) for token in _TOKENS]
        tokenizer.add_tokens(added, True)
        tokenizer.save_pretrained(folder)
        theirs = _Theirs(given.python, folder, given.processor)
        encoders = {
            backend: Encoder(by_name("v2_6"), tokenizer, CONFIG, max_pixels=MAX_PIXELS, image_backend=backend)
            for backend in ("pillow", "fast")
        }
        samples = open_data(folder / "data.json", None)
        ours = {backend: SupervisedDataset(samples, encoder) for backend, encoder in encoders.items()}
        collate = DataCollator(encoders["pillow"].pad_id)
        every = [number for each in numbers.values() for number in each]
        for number in every:
            theirs.compare(number, ours["pillow"][number], folder / "theirs.npz")
        print(f"ids, places, sizes and pixels of {len(every)} samples agree; LLaMA-Factory {theirs.version}")
        keep_freed_memory()  # as our loader processes
        gc.collect()
        gc.freeze()
        times: dict[str, list[float]] = {"theirs": [], **{backend: [] for backend in ours}}
        for number in every:
            taken: dict[str, list[float]] = {side: [] for side in times}
            for _ in range(given.rounds):
                taken["theirs"].append(theirs.time(number))
                for backend, dataset in ours.items():
                    start = time.process_time()
                    collate([dataset[number]])
                    taken[backend].append(1000 * (time.process_time() - start))
            for side, each in taken.items():
                times[side].append(statistics.median(each))
    mean = {side: statistics.mean(each) for side, each in times.items()}
    rows = []
    for backend, option in (("pillow", "identical"), ("fast", "--image_backend fast")):
        case = f"sample preparation, mix, {option}, LLaMA-Factory {theirs.version}"
        ratio = mean["theirs"] / mean[backend]
        rows.append((case, mean[backend], mean["theirs"], ratio, "ms of CPU time per sample"))
        print(f"{case:<80} {mean[backend]:8.2f} {mean['theirs']:8.2f} {ratio:6.2f}")
    if not given.dry:
        append("llamafactory_samples", rows, ["torch", "pillow", "transformers", "tokenizers"])
    return 0


class _Theirs:
    """The other side, in its own Python."""

    def __init__(self, python: str, folder: Path, processor: Path) -> None:
        side = Path(__file__).with_name("llamafactory_side.py")
        command = [python, str(side), str(folder), str(processor)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()

    def time(self, number: int, file: str = "") -> float:
        """Milliseconds of a record; with a file what was made of it is written there."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number} {file}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def compare(self, number: int, ours: Any, file: Path) -> None:
        """Ends the run where both sides do not make the same of a record."""
        self.time(number, str(file))
        theirs = np.load(file)
        count = len(ours.input_ids)
        # Its answers end with a line break behind the end mark; ours go on where a conversation does.
        assert theirs["input_ids"][:count].tolist() == ours.input_ids.tolist(), ours.source
        assert theirs["image_bound"].tolist() == ours.image_bound.tolist(), ours.source
        assert theirs["tgt_sizes"].tolist() == ours.tgt_sizes.tolist(), ours.source
        for item, strip in enumerate(strips(ours)):
            apart = 127.5 * np.abs(strip.numpy() - theirs[f"pixels{item}"])
            assert apart.mean() < 0.05, (ours.source, apart.mean(), apart.max())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("LLaMA-Factory's side ended")
        return line.strip()


if __name__ == "__main__":
    sys.exit(main())
