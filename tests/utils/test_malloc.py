"""Whether a process keeps the memory of large blocks that it frees."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from finetune.utils import malloc

BLOCKS, SIZE = 32, 4 << 20
# Large blocks with a smaller one behind each, as a merge makes them; after a first large block was freed.
PROGRAM = f"""
import ctypes, re
from finetune.utils import malloc

{{call}}
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.free(c.malloc({SIZE}))
blocks = []
for _ in range({BLOCKS}):
    blocks.append(c.malloc({SIZE}))
    ctypes.memset(blocks[-1], 1, {SIZE})
    c.malloc(120_000)  # larger than any gap that python may have left
full = int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
for block in blocks:
    c.free(block)
left = int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
print((full - left) * 1024)
"""


@pytest.mark.parametrize(
    ("call", "returned"), [("malloc.keep_freed_memory()", False), ("malloc.return_freed_memory()", True)]
)
def test_blocks_that_were_freed(call: str, returned: bool) -> None:
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    given_back = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert given_back > 0.9 * BLOCKS * SIZE if returned else given_back < 0.1 * BLOCKS * SIZE


@pytest.mark.parametrize("setting", [malloc.keep_freed_memory, malloc.return_freed_memory])
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch, setting) -> None:
    setting.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert setting() is False
    setting.cache_clear()
