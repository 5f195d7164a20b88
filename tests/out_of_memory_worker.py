"""finetune.py, of which one rank runs out of memory in its second step: OUT_OF_MEMORY_RANK says which."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from finetune.runtime import outcome  # noqa: F401 - before torch

import torch  # isort: skip

from trainer import CPMTrainer

MESSAGE = (
    "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 1 has a total capacity of 23.65 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 22.40 GiB memory in use. Of the allocated memory 21.00 GiB "
    "is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated."
)


class Short(CPMTrainer):
    """As on a GPU that is too small."""

    def compute_loss(self, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 1 and os.environ["RANK"] == os.environ["OUT_OF_MEMORY_RANK"]:
            raise torch.OutOfMemoryError(MESSAGE)
        return super().compute_loss(*args, **kwargs)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    import trainer

    trainer.CPMTrainer = Short
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "finetune.py"), run_name="__main__")
