"""Files that are unpickled when a run is resumed: looked at first, so that no file of somebody else runs code.

DeepSpeed reads its parts of a checkpoint with the unrestricted unpickler. The names that such a file would import
stand in it in plain sight: they are listed without running any of it, and only those that the libraries themselves
write are let through.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from finetune.utils.errors import UserError

PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
"""Ends of names of files that are pickles."""

# What torch, numpy and DeepSpeed write beside what torch itself knows to be harmless: classes that hold plain values.
_HARMLESS = frozenset(
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
    """A file that would run code when it is read."""


class DamagedError(UserError):
    """A file that cannot be read at all."""


def pickled_files(folder: Path) -> list[Path]:
    """Everything in a folder that may be a pickle, whatever it is for."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICKLED and path.is_file())


def check_pickles(files: Iterable[Path]) -> None:
    """Checks that files name nothing but what the libraries write; no byte of them is unpickled.

    Raises:
        ForeignCodeError: a file would import something else when it is read.
        DamagedError: a file is cut short.
    """
    for path in files:
        try:
            foreign = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - _HARMLESS)
        except (RuntimeError, OSError, EOFError) as error:
            raise DamagedError(f"{path} is damaged: {_first_line(error)}") from error
        except (ValueError, IndexError, KeyError, struct.error, pickle.UnpicklingError) as error:
            raise ForeignCodeError(
                f"{path} is not read: it is no file of torch.save whose content can be told beforehand "
                f"({_first_line(error)}), and reading such a file may run code"
            ) from error
        if foreign:
            raise ForeignCodeError(
                f"{path} is not read: it would import {', '.join(foreign)}, which no checkpoint needs and which may "
                "run code. It is not of a run of this project, or was changed since: take weights from *.safetensors"
            )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
