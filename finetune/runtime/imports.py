"""Faster imports of large libraries: garbage collection runs rarely; bitsandbytes and datasets are hidden.

Transformers and peft do not find those two until something of ours imports them.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# peft and transformers import these where they find them, for 4 and 8 bit weights and for their own data sets. Together
# they take more than a second; what needs them imports them itself.
_OPTIONAL = ("bitsandbytes", "datasets")
# Importing creates about a million objects, nearly all of which stay: by default a fifth of the time goes into looking
# for garbage among them.
_THRESHOLD = (50_000, 20, 100)
TRAINING_MODULES = (
    "torch",
    "trainer",
    "finetune.arguments.parse",
    "finetune.checkpoints.run_start",
    "finetune.__main__",
)
"""What finetune.py needs in any case."""
# Those that this program hides.
_hidden: set[str] = set()


def collect_rarely() -> None:
    """Lets the garbage collector of this process run rarely; for programs that end soon."""
    gc.set_threshold(*_THRESHOLD)


def hide_optional_libraries() -> None:
    """From now on ``optional_libraries_hidden`` hides what this program has not imported until then.

    peft asks once per process whether bitsandbytes is there: where it is hidden as the first adapter is put on, no
    later model in 4 bit can have one.
    """
    _hidden.update(name for name in _OPTIONAL if name not in sys.modules)


def import_at_start(*modules: str) -> None:
    """Imports the modules that a program needs in any case, before it does anything else.

    Libraries that are only wanted where installed are hidden until something imports them. What was imported is not
    searched for garbage again.
    """
    before = gc.get_threshold()
    collect_rarely()
    hide_optional_libraries()
    with optional_libraries_hidden():
        for module in modules:
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*before)


@contextmanager
def optional_libraries_hidden(*, unless: bool = False) -> Iterator[None]:
    """Within, the hidden libraries that nothing has imported since are not found.

    Args:
        unless: whether they are needed after all; then nothing changes.
    """
    with libraries_hidden(*() if unless else _hidden):
        yield


@contextmanager
def libraries_hidden(*names: str) -> Iterator[None]:
    """Within, those of these libraries that are not imported yet are not found."""
    hidden = [name for name in names if name not in sys.modules]
    # Python's rule for None in modules.
    sys.modules.update(dict.fromkeys(hidden))  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
