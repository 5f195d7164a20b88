#!/bin/sh
# torch 2.14.1: torch.nn.functional.grouped_mm, by which transformers computes routed experts.
#
# Expected: what runs on the CPU in float32 also gives shapes on the meta device, and FlopCounterMode counts its products
#           (2 x 8 x 16 x 32 = 8192 operations below), as it does those of matmul.
# Seen:     the meta device takes bfloat16 alone, so a network whose experts run in float32 cannot be traced without
#           memory; and no operation is counted, so that the experts of a mixture are missing from its total.
#
# Output seen:
#   cpu float32: (8, 32)
#   meta float32: RuntimeError: Expected mat_a to be BFloat16 or supported Float16 matrix, got torch.float32.
#   meta bfloat16: (8, 32)
#   counted: 0 of 8192 operations, of matmul 8192
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import FlopCounterMode


def product(device: str, dtype: torch.dtype) -> torch.Tensor:
    """8 rows of 16 numbers; the first 3 through one (16, 32) matrix, the others through another."""
    rows = torch.ones(8, 16, device=device, dtype=dtype)
    matrices = torch.ones(2, 16, 32, device=device, dtype=dtype)
    return grouped_mm(rows, matrices, offs=torch.tensor([3, 8], dtype=torch.int32, device=device))


changed = tuple(product("cpu", torch.float32).shape) != (8, 32)
print("cpu float32: (8, 32)")
try:
    product("meta", torch.float32)
    changed = True
except RuntimeError as error:
    print(f"meta float32: RuntimeError: {error}")
print(f"meta bfloat16: {tuple(product('meta', torch.bfloat16).shape)}")
with FlopCounterMode(display=False) as grouped:
    product("cpu", torch.float32)
with FlopCounterMode(display=False) as plain:
    torch.ones(8, 16) @ torch.ones(16, 32)
counted = (grouped.get_total_flops(), plain.get_total_flops())
print(f"counted: {counted[0]} of 8192 operations, of matmul {counted[1]}")
sys.exit(int(changed or counted != (0, 8192)))
PYTHON
