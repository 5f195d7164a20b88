"""Checks the pickle files of a checkpoint before a run resumes from it, so that they cannot run code.

DeepSpeed loads its checkpoint shards with the unrestricted unpickler. The globals that a pickle would import are listed
without unpickling it, and only those that the libraries themselves write are accepted.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from finetune.utils.errors import UserError

PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
"""Suffixes of pickle files."""

# Globals that torch, numpy and DeepSpeed write, in addition to torch's own safe globals: classes of plain values.
_SAFE_GLOBALS = frozenset(
    {
        "numpy.ndarray",
        "numpy.dtype",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


class ForeignCodeError(UserError):
    """A file that may run code when it is unpickled."""


class DamagedError(UserError):
    """A file that cannot be read."""


def pickled_files(folder: Path) -> list[Path]:
    """All files of a folder that may be pickles, by suffix."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICKLED and path.is_file())


def check_pickles(files: Iterable[Path]) -> None:
    """Checks the globals of pickle files without unpickling them.

    Raises:
        ForeignCodeError: a file would import something else when it is unpickled.
        DamagedError: a file is truncated.
    """
    for path in files:
        try:
            unsafe = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - _SAFE_GLOBALS)
        except (RuntimeError, OSError, EOFError) as error:
            raise DamagedError(f"{path} is damaged: {_first_line(error)}") from error
        except (ValueError, IndexError, KeyError, struct.error, pickle.UnpicklingError) as error:
            raise ForeignCodeError(
                f"{path} is not read: it is not a torch.save file that can be checked without unpickling it "
                f"({_first_line(error)}), and unpickling may run code"
            ) from error
        if unsafe:
            raise ForeignCodeError(
                f"{path} is not read: unpickling it would import {', '.join(unsafe)}, which no checkpoint needs and "
                "which may run code. It was not written by this toolkit, or was changed: load *.safetensors instead"
            )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
