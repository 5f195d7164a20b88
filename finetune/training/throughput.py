"""Throughput in the training log: samples/s, tokens/s, data waiting time, MFU and peak memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from finetune.training.flops import COUNTS, Count, Flops

_MICRO = 1_000_000
# Peak dense 16 bit FLOP/s of NVIDIA's data sheets (bf16; fp16 for V100, which has no bf16) with fp32 accumulation, by
# the device name of CUDA. Not here: cards sold in partitions, and cards whose data sheets differ.
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
    """Peak of a device in dense 16 bit FLOP/s; None for one that is not in the table."""
    return next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)


class Throughput:
    """Counts between two log entries, without synchronising the device or the ranks until the entry is written.

    An entry has, over all ranks and without the time of evaluation and saving:

    * samples_per_second, tokens_per_second: tokens of the LLM, with image tokens, without padding.
    * data_wait: share of the time spent waiting for the next batch, mean over the ranks.
    * mfu: model FLOPs (``finetune.training.flops``) divided by the peak of the GPUs; if the peak is unknown,
      tflops_per_second instead.
    * peak_memory_gb: peak allocated memory since the last entry, in 2^30 bytes, of the GPU with the most; not on a CPU.

    Args:
        flops: cost model of the model.
        gather: gathers (1, k) tensors of all ranks to (ranks, k).
        device: of the model.
        clock: returns seconds.
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
        """Counts a micro-batch that is about to be trained on."""
        self._newest = self._flops.counts(inputs)
        for name, value in self._newest.items():
            self._counts[name] = self._counts[name] + value

    @property
    def operations(self) -> float:
        """FLOPs of the newest micro-batch, forward and backward, by the cost model."""
        return self._flops.of({name: int(value) for name, value in self._newest.items()})

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; the time until each arrives counts as waiting."""
        if not self._begun:  # time before the first batch is not training time
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
        """Adds time spent waiting for the next batch."""
        self._waited += seconds

    def pause(self, seconds: float) -> None:
        """Subtracts time that is not training time (evaluation, saving)."""
        self._paused += seconds

    def log(self) -> dict[str, float]:
        """The values since the last call; every rank must call it."""
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
