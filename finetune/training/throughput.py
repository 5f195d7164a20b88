"""How fast a training is: what every line of its log says about tokens, waiting, operations and memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from finetune.training.flops import COUNTS, Count, Flops

_MICRO = 1_000_000
# Dense 16 bit operations per second that NVIDIA's data sheets give (bf16; fp16 for V100, which has no bf16), sums in
# fp32, by the name that CUDA gives the device. Products of which a part of a card is sold or whose sheets differ are
# not here: a share of a wrong peak says nothing.
_PEAKS = {
    r"(NVIDIA )?A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"(NVIDIA |Tesla )+V100-SXM2-\d+GB": 125e12,
    r"(NVIDIA |Tesla )+V100-PCIE-\d+GB": 112e12,
}


def peak_of(name: str) -> float | None:
    """Peak of a device in dense 16 bit operations per second; None for one that is not in the table."""
    return next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)


class Throughput:
    """Counts between two lines of the log, without synchronising anything until the line is written.

    A line has, over all ranks and without evaluation and saving:

    * samples_per_second, tokens_per_second: tokens of the LLM, images included, padding not.
    * data_wait: share of the time that the training waited for its next batch, the mean of the ranks.
    * mfu: operations of the model (``finetune.training.flops``) by the peak of the GPUs; where that is not known
      tflops_per_second instead, 10^12 operations.
    * peak_memory_gb: 2^30 bytes of tensors on the fullest GPU since the last line; not on a CPU.

    Args:
        flops: what the model costs.
        gather: puts (1, k) tensors of all ranks together, (ranks, k).
        device: that the model is on.
        clock: seconds.
    """

    def __init__(
        self,
        flops: Flops,
        gather: Callable[[torch.Tensor], Any],
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops, self._gather, self._device, self._clock = flops, gather, device, clock
        self._peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._begun = False
        self._newest: Mapping[str, Count] = {}
        self._clear()

    def _clear(self) -> None:
        self._counts: dict[str, Count] = dict.fromkeys(COUNTS, 0)
        self._waited = self._paused = 0.0
        self._start = self._clock()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Takes note of a micro-batch that is about to be trained on."""
        self._newest = self._flops.counts(inputs)
        for name, value in self._newest.items():
            self._counts[name] = self._counts[name] + value

    @property
    def operations(self) -> float:
        """Those of the newest micro-batch, forward and backward, by the cost model."""
        return self._flops.of({name: int(value) for name, value in self._newest.items()})

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time that each takes to arrive is waiting."""
        if not self._begun:  # what came before the first batch is no training
            self._begun = True
            self._clear()
        while True:
            start = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited(self._clock() - start)
            yield batch

    def waited(self, seconds: float) -> None:
        """So long the training stood still for its next batch."""
        self._waited += seconds

    def pause(self, seconds: float) -> None:
        """So long something else was done, which is not to count."""
        self._paused += seconds

    def log(self) -> dict[str, float]:
        """The figures since the last call; every rank must make it."""
        seconds = max(self._clock() - self._start - self._paused, 1e-9)
        cuda = self._device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self._device) if cuda else 0
        own = [*(int(self._counts[name]) for name in COUNTS), round(self._waited / seconds * _MICRO), memory]
        ranks: list[list[int]] = self._gather(torch.tensor([own], device=self._device)).tolist()
        self._clear()
        counts = {name: sum(rank[place] for rank in ranks) for place, name in enumerate(COUNTS)}
        speed = self._flops.of(counts) / seconds
        figures = {
            "samples_per_second": round(counts["samples"] / seconds, 3),
            "tokens_per_second": round(counts["tokens"] / seconds, 1),
            "data_wait": round(sum(rank[-2] for rank in ranks) / len(ranks) / _MICRO, 4),
        }
        if self._peak is None:
            figures["tflops_per_second"] = float(f"{speed / 1e12:.4g}")
        else:
            figures["mfu"] = round(speed / self._peak / len(ranks), 4)
        if cuda:
            figures["peak_memory_gb"] = round(max(rank[-1] for rank in ranks) / 2**30, 2)
        return figures
