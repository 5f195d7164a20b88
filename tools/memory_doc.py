"""Generates docs/memory.md, the memory estimates of all families: ``python -m tools.memory_doc`` (some minutes)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune.families import by_name
from finetune.planning.estimate_table import gigabytes
from finetune.planning.memory_estimate import GIB, MemoryEstimate, MemoryPlanner
from finetune.planning.meta_model import quiet
from finetune.planning.published_shapes import ASSUMED, CONFIGS
from finetune.planning.settings_search import ALL_METHODS, gpus_needed
from finetune.planning.training_setup import SampleShape, TrainingSetup

_SHAPE = SampleShape()
_AGAIN = TrainingSetup()
_COLUMNS: dict[str, TrainingSetup] = {
    "QLoRA": replace(_AGAIN, method="qlora"),
    "LoRA": _AGAIN,
    "LoRA, 8 GPUs, ZeRO-3": replace(_AGAIN, stage=3, gpus=8),
    "LLM in full, 8 GPUs, ZeRO-3": replace(_AGAIN, method="full-llm", stage=3, gpus=8),
    "all in full, 8 GPUs, ZeRO-2": replace(_AGAIN, method="full", stage=2, gpus=8),
    "all in full, 8 GPUs, ZeRO-3": replace(_AGAIN, method="full", stage=3, gpus=8),
    "all in full, 8 GPUs, ZeRO-3, offload": replace(_AGAIN, method="full", stage=3, gpus=8, offload=True),
}
_CARDS = (24, 80)

HEAD = f"""\
# What fits on the card

```
python -m finetune plan MODEL DATA             # a checkpoint folder and a data file
python -m finetune plan v4_5 --gpus 8 --gpu_memory 80 --length 4096 --batch 2
```

prints the memory of a training step on one GPU for every method, stage of ZeRO, offload and activation checkpointing,
marks what fits `--gpu_memory` (default: the GPU here, else 24), and gives the fastest settings that fit as flags to
paste. MODEL may be a folder with nothing but config.json, a hub id, or the name of a family; DATA is measured with the
checkpoint's tokenizer (the longest record counts), without it `--length`, `--slices` and `--images` do. 4.6 and 4.7 are
planned with `--downsample_mode 4x` as they are trained with it; images that need more than `--length` (default 2048)
make the sample longer or, where it is given, lose slices.

## All families

GB (2**30 bytes) on one GPU at the highest point of a step: {_SHAPE.batch} sample of {_SHAPE.tokens} tokens per GPU, a
quarter of them labelled, {_SHAPE.items} visual items of {_SHAPE.patches} patches, layers run again in the backward pass
(`--gradient_checkpointing true`), rank 64, bf16. Without "8 GPUs": one GPU without DeepSpeed.
"""

_FITS = """
## The fastest settings that fit

On the smallest number of GPUs (1, 2, 4, ... 64) on which a method fits at all; GB per GPU. "again" means
`--gradient_checkpointing true`, with a part behind it `--checkpoint_parts` of that part, "pieces" `--vision_batch 8`.
Offload takes 16 to 18 bytes of the machine's memory per trained parameter: about 140 GB for everything of an 8B model.
"""

TAIL = """
## Flags that save memory

- `--gradient_checkpointing true`: the layers of the LLM, the vision and the audio tower are run again in the backward
  pass. `--checkpoint_parts llm` (or `llm vision`, ...) leaves the others as they are. A frozen tower runs without a
  graph and keeps nothing either way. `--checkpoint_parts fit` makes this plan when training starts, for its flags, its
  records and the memory of its GPU, and runs again nothing, the tower, the LLM or everything, the first that fits; it
  says what it chose. Without a GPU it runs everything again.
- `--vision_batch 8`: at most 8 visual items (thumbnails, slices, frames; packed frames stay together) pass the vision
  part at once. Loss and gradients stay the same. It bounds the memory of a frozen tower and of one whose layers are run
  again. Under ZeRO-3 ranks agree on the number of pieces in every step, and those with fewer run a tiny grey picture.

## What is counted

- **Weights**: 2 bytes each in bf16; without DeepSpeed those that train are fp32 (4 bytes); 4 bit weights of QLoRA about
  0.52 bytes.
- **Gradients**: as the weights they belong to. **Optimizer**: Adam's two moments, 8 bytes per trained parameter, and 4
  more for the fp32 masters under DeepSpeed. ZeRO-2 divides both by the number of GPUs, ZeRO-3 the weights as well;
  offload moves them into the memory of the machine. While DeepSpeed's optimizer steps, its gradients exist three times
  (as they are, in a row, in fp32): 6 bytes per trained parameter of this GPU's share on top.
- **Activations**: not a formula. The forward pass runs on the meta device, on tensors with shapes and without memory,
  and torch tells what it keeps for the backward pass; attention keeps its inputs, its output and one number per row and
  head, as SDPA's kernels and FlashAttention do, and in batches of rows of different lengths one mask per layer. Frozen
  towers keep nothing. With checkpointing a layer keeps its input. Then the step is played through, block by block,
  forward and back, and the highest point counts. Of a mixture every expert's weights lie there, but only the tokens
  that are sent to it; grouped products are in the type of the experts' weights, which autocast leaves alone: without
  DeepSpeed full training has them in fp32.
- **Logits**: only positions that carry loss have any: positions x vocabulary, in fp32 with their gradients 12 bytes.
- **Buffers**: the buckets of the `ds_config_*.json` here (ZeRO-2: two of 200 million elements; ZeRO-3: up to a
  billion gathered parameters and its buckets), DDP's buckets without DeepSpeed.
- **Context**: 1 GB for CUDA and its libraries, 3 % for what torch's allocator cannot use: a rule of thumb.

## How far it can be trusted

`benchmarks/plan_memory.py` runs real steps of a network of medium size on the CPU in fp32, every allocation counted,
and compares them with the plan: full and LoRA, with and without images, checkpointing and padding, all were within 6 %
of what comes and goes with a step and 2 % of the whole; of 4.7 with a mixture of experts, within 10 % and 3 %. The
figures are in `benchmarks/results.csv`; the tests hold some cases within 20 %. **GPU peaks were not measured**:
context, fragmentation, the workspaces of libraries and DeepSpeed's temporaries are taken from their code and from
experience, autocast is imitated. The linear attention of 4.6, 4.7 and OCR is counted as transformers computes it where
flash-linear-attention is not installed; with it less is kept. Sound is not counted: its tower is small, and a clip of
30 s is 1500 steps of it.
"""


def page() -> str:
    """docs/memory.md."""
    planners = {name: MemoryPlanner(config) for name, config in CONFIGS.items()}
    lines = [f"| | parameters | {' | '.join(_COLUMNS)} |", f"|{'---|' * (len(_COLUMNS) + 2)}"]
    lines += [family_row(name, planner) for name, planner in planners.items()]
    assumed = ", ".join(by_name(name).title for name in ASSUMED)
    lines += ["", f"Sizes partly told by others, as their config.json was not at hand: {assumed}.", _FITS]
    lines += [f"| | {' | '.join(f'{method}, {card} GB' for card in _CARDS for method in ALL_METHODS)} |"]
    lines += [f"|{'---|' * (len(_CARDS) * len(ALL_METHODS) + 1)}"]
    lines += [fitting_row(name, planner) for name, planner in planners.items()]
    return "\n".join([HEAD, *lines, TAIL])


def family_row(name: str, planner: MemoryPlanner) -> str:
    """A family's line of the first table."""
    cells = [gigabytes(planner.memory(recipe, _SHAPE).total) for recipe in _COLUMNS.values()]
    return f"| {by_name(name).title} | {planner.parameters() / 1e9:.2f} billion | {' | '.join(cells)} |"


def fitting_row(name: str, planner: MemoryPlanner) -> str:
    """A family's line of the second table."""
    found = [gpus_needed(planner, _SHAPE, TrainingSetup(), m, card * GIB) for card in _CARDS for m in ALL_METHODS]
    return f"| {by_name(name).title} | {' | '.join(_cell(pair) for pair in found)} |"


def _cell(found: tuple[TrainingSetup, MemoryEstimate] | None) -> str:
    if found is None:
        return "-"
    recipe, memory = found
    words = [f"{recipe.gpus} GPU{'s' if recipe.gpus > 1 else ''}"]
    words += [f"ZeRO-{recipe.stage}"] if recipe.stage else []
    words += ["offload"] if recipe.offload else []
    words += [" ".join(["again", *(recipe.checkpoint_parts or ())])] if recipe.checkpointing else []
    words += ["pieces"] if recipe.vision_batch else []
    return f"{gigabytes(memory.total)}: {', '.join(words)}"


if __name__ == "__main__":
    with quiet():
        (Path(__file__).parents[1] / "docs" / "memory.md").write_text(page(), encoding="utf-8")
