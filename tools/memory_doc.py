"""Writes docs/memory.md, the memory estimates of all families: ``python -m tools.memory_doc`` (some minutes)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from finetune.families import FAMILIES, by_name
from finetune.planning.estimate_table import gigabytes
from finetune.planning.memory_estimate import GIB, MemoryEstimate, MemoryEstimator
from finetune.planning.meta_model import quiet
from finetune.planning.settings_search import ALL_METHODS, gpus_needed
from finetune.planning.training_setup import SampleShape, TrainingSetup

_SHAPE = SampleShape()
_RECOMPUTED = TrainingSetup()
_COLUMNS: dict[str, TrainingSetup] = {
    "QLoRA": replace(_RECOMPUTED, method="qlora"),
    "LoRA": _RECOMPUTED,
    "LoRA, 8 GPUs, ZeRO-3": replace(_RECOMPUTED, stage=3, gpus=8),
    "LLM in full, 8 GPUs, ZeRO-3": replace(_RECOMPUTED, method="full-llm", stage=3, gpus=8),
    "all in full, 8 GPUs, ZeRO-2": replace(_RECOMPUTED, method="full", stage=2, gpus=8),
    "all in full, 8 GPUs, ZeRO-3": replace(_RECOMPUTED, method="full", stage=3, gpus=8),
    "all in full, 8 GPUs, ZeRO-3, offload": replace(_RECOMPUTED, method="full", stage=3, gpus=8, offload=True),
}
_CARDS = (24, 80)
_DENSE = by_name("v4_7").published.config
MIXTURE = {
    **_DENSE,
    "tie_word_embeddings": False,
    "text_config": {
        **{key: value for key, value in _DENSE["text_config"].items() if key != "intermediate_size"},
        "hidden_size": 2048,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
        "linear_num_value_heads": 32,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
    },
}
"""4.7-35B-A3B: the vision part of 4.7, the language model by the defaults of ``Qwen3_5MoeTextConfig``."""
_EIGHT = TrainingSetup(stage=3, gpus=8)
MIXTURE_COLUMNS: dict[str, TrainingSetup] = {
    "LoRA": _EIGHT,
    "LLM in full": replace(_EIGHT, method="full-llm"),
    "all in full": replace(_EIGHT, method="full"),
    "all in full, offload": replace(_EIGHT, method="full", offload=True),
}

HEAD = f"""\
# Memory estimates

```shell
python -m finetune plan MODEL DATA             # a checkpoint folder and a data file
python -m finetune plan v4_5 --gpus 8 --gpu_memory 80 --length 4096 --batch 2
```

prints the estimated peak memory of a training step on one GPU for every method, ZeRO stage, offload and activation
checkpointing, marks what fits `--gpu_memory` (default: the GPU here, else 24), and prints the fastest settings that
fit as flags to paste. MODEL may be a folder with nothing but config.json, a hub id, or the name of a family; DATA is
measured with the checkpoint's tokenizer (the longest record counts), without it `--length`, `--slices` and `--images`
do. 4.6 and 4.7 are planned with `--downsample_mode 4x` as they are trained with it; images that need more than
`--length` (default 2048) make the sample longer or, where it is given, lose slices.

## All families

Peak memory of a step in GB (2**30 bytes) on one GPU: {_SHAPE.batch} sample of {_SHAPE.tokens} tokens per GPU, a
quarter of them labelled, {_SHAPE.items} visual items of {_SHAPE.patches} patches, layers recomputed in the backward
pass (`--gradient_checkpointing true`), rank 64, bf16. Without "8 GPUs": one GPU without DeepSpeed.
"""

_FITS = """
## The fastest settings that fit

On the smallest number of GPUs (1, 2, 4, ... 64) on which a method fits at all; GB per GPU. "recompute" means
`--gradient_checkpointing true`, with a part behind it `--checkpoint_parts` of that part, "chunks" `--vision_batch 8`.
Offload takes 16 to 18 bytes of CPU memory per trained parameter: about 140 GB for everything of an 8B model.
"""

_EXPERTS = """
## Mixture of experts

MiniCPM-V 4.7-35B-A3B on 8 GPUs of 80 GB with ZeRO-3, one sample per GPU as above; LoRA leaves the experts frozen. Every
expert's weights count, and the tokens that are routed to it. Its config.json was not available: the language model has
the sizes that are the defaults of its class in transformers (40 layers, 256 experts of which 8 see a token), the vision
part those of 4.7.
"""

TAIL = """
## Flags that save memory

- `--gradient_checkpointing true`: the layers of the LLM, the vision and the audio tower are recomputed in the backward
  pass, and the resampler, a few items at a time. `--checkpoint_parts llm` (or `llm vision`, ...) recomputes only these.
  A frozen tower runs without a graph and stores no activations either way. `--checkpoint_parts fit` makes this estimate
  when training starts, for its flags, its records and the memory of its GPU, and recomputes nothing, the tower, the LLM
  or everything, the first that fits; the log prints its choice. Without a GPU everything is recomputed.
- `--vision_batch 8`: at most 8 visual items (thumbnails, slices, frames; packed frames stay together) pass the vision
  tower at once. Loss and gradients stay the same. It bounds the memory of a frozen tower and of one whose layers are
  recomputed. Under ZeRO-3 ranks agree on the number of chunks in every step, and those with fewer run a tiny grey
  image.

## When a run runs out of memory

The error of a training run names up to three sets of flags, computed by this estimate for the model, the flags, the
longest records and the memory that the GPU has for this process. They are tried in the order of their price, alone
and up to three together:

| flag | price |
|---|---|
| `--vision_batch 8` | a little time |
| `--per_device_train_batch_size` halved or 1, more `--gradient_accumulation_steps` | time where samples are short |
| `--packing_tokens` halved, of packed rows | the same |
| `--checkpoint_parts vision`, `llm`, then all | up to a third of the time |
| `--deepspeed ds_config_zero2.json`, `ds_config_zero3.json`, on several GPUs | communication |
| `--deepspeed ds_config_zero2_offload.json`, `ds_config_zero3_offload.json` | CPU memory, transfers |
| `--q_lora true`, for LoRA | a base in 4 bit |
| `--model_max_length` at three quarters, at half | long samples lose slices or turns |

If the run used more than the estimate of its flags, the estimates of the others are raised by the same factor. If
nothing fits, the message says so and names what saves most. A changed ZeRO stage or `--q_lora` cannot resume a
checkpoint of the run; the message marks them. It takes some seconds on the CPU while the other ranks wait. An error
of the estimate does not hide the first error.

## What is counted

- **Weights**: 2 bytes each in bf16; without DeepSpeed those that train are fp32 (4 bytes); 4 bit weights of QLoRA
  about 0.52 bytes.
- **Gradients**: as the weights they belong to. **Optimizer**: Adam's two moments, 8 bytes per trained parameter, and 4
  more for the fp32 master weights under DeepSpeed. ZeRO-2 divides both by the number of GPUs, ZeRO-3 the weights as
  well; offload moves them into CPU memory. While DeepSpeed's optimizer steps, its gradients exist three times (as they
  are, flattened, in fp32): 6 bytes per trained parameter of this GPU's share on top.
- **Activations**: traced, not a formula. The forward pass runs on the meta device, on tensors with shapes and without
  memory, and the tensors that torch saves for the backward pass are counted; attention keeps its inputs, its output
  and one number per row and head, as SDPA's kernels and FlashAttention do, and in batches of rows of different lengths
  one mask per layer. Frozen towers keep nothing. With checkpointing a layer keeps its input. Then the step is
  simulated, block by block, forward and backward, and the peak counts. Of a mixture of experts every expert's weights
  count, but only the tokens routed to it; grouped products are in the type of the experts' weights, which autocast
  leaves alone: without DeepSpeed full training has them in fp32.
- **Logits**: only positions that carry loss have them: positions x vocabulary, in fp32 with their gradients 12 bytes.
- **Buffers**: the buckets of the `ds_config_*.json` here (ZeRO-2: two of 200 million elements; ZeRO-3: up to a billion
  gathered parameters and its buckets), DDP's buckets without DeepSpeed.
- **Context**: 1 GB for CUDA and its libraries, 3 % for what torch's allocator cannot use: a rule of thumb.

## Accuracy

`benchmarks/plan_memory.py` runs real steps of a medium-sized model on the CPU in fp32, every allocation counted, and
compares them with the estimate: full and LoRA, with and without images, checkpointing and padding, all were within 6 %
of what comes and goes with a step and 2 % of the whole; of 4.7 with a mixture of experts, within 10 % and 3 %. The
figures are in `benchmarks/results.csv`; the tests hold some cases within 20 %. **GPU peaks were not measured**:
context, fragmentation, the workspaces of libraries and DeepSpeed's temporaries are taken from their code and from
experience, autocast is imitated. The linear attention of 4.6, 4.7 and OCR is counted as transformers computes it where
flash-linear-attention is not installed; with it less is kept. Audio is not counted: its tower is small, and a clip of
30 s is 1500 steps of it.
"""


def page() -> str:
    """docs/memory.md."""
    planners = {family.name: MemoryEstimator(dict(family.published.config)) for family in FAMILIES}
    lines = [f"| | parameters | {' | '.join(_COLUMNS)} |", f"|{'---|' * (len(_COLUMNS) + 2)}"]
    lines += [family_row(name, planner) for name, planner in planners.items()]
    assumed = ", ".join(family.title for family in FAMILIES if family.published.assumed)
    lines += ["", f"Sizes partly from other sources, as the config.json was not available: {assumed}.", _FITS]
    lines += [f"| | {' | '.join(f'{method}, {card} GB' for card in _CARDS for method in ALL_METHODS)} |"]
    lines += [f"|{'---|' * (len(_CARDS) * len(ALL_METHODS) + 1)}"]
    lines += [fitting_row(name, planner) for name, planner in planners.items()]
    lines += [_EXPERTS, f"| | parameters | {' | '.join(MIXTURE_COLUMNS)} |", f"|{'---|' * (len(MIXTURE_COLUMNS) + 2)}"]
    lines += [mixture_row(MemoryEstimator(MIXTURE), MIXTURE_COLUMNS.values())]
    return "\n".join([HEAD, *lines, TAIL])


def family_row(name: str, planner: MemoryEstimator) -> str:
    """A family's line of the first table."""
    cells = [gigabytes(planner.memory(recipe, _SHAPE).total) for recipe in _COLUMNS.values()]
    return f"| {by_name(name).title} | {planner.parameters() / 1e9:.2f} billion | {' | '.join(cells)} |"


def mixture_row(planner: MemoryEstimator, setups: Iterable[TrainingSetup]) -> str:
    """The line of the mixture of experts, with CPU memory where something is offloaded."""
    cells = [f"MiniCPM-V 4.7-35B-A3B | {planner.parameters() / 1e9:.2f} billion"]
    for setup in setups:
        memory = planner.memory(setup, _SHAPE)
        host = f", and {gigabytes(memory.host)} of CPU memory per GPU" if memory.host else ""
        cells.append(f"{gigabytes(memory.total)}{host}")
    return f"| {' | '.join(cells)} |"


def fitting_row(name: str, planner: MemoryEstimator) -> str:
    """A family's line of the second table."""
    found = [gpus_needed(planner, _SHAPE, TrainingSetup(), m, card * GIB) for card in _CARDS for m in ALL_METHODS]
    return f"| {by_name(name).title} | {' | '.join(_cell(pair) for pair in found)} |"


def _cell(found: tuple[TrainingSetup, MemoryEstimate] | None) -> str:
    if found is None:
        return "-"
    recipe, memory = found
    settings = [f"{recipe.gpus} GPU{'s' if recipe.gpus > 1 else ''}"]
    settings += [f"ZeRO-{recipe.stage}"] if recipe.stage else []
    settings += ["offload"] if recipe.offload else []
    settings += [" ".join(["recompute", *(recipe.checkpoint_parts or ())])] if recipe.checkpointing else []
    settings += ["chunks"] if recipe.vision_batch else []
    return f"{gigabytes(memory.total)}: {', '.join(settings)}"


if __name__ == "__main__":
    with quiet():
        (Path(__file__).parents[1] / "docs" / "memory.md").write_text(page(), encoding="utf-8")
