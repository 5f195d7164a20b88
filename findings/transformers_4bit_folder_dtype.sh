#!/bin/sh
# transformers 5.24.0 with bitsandbytes 0.50.2: a folder that was saved in 4 bit, loaded with another dtype than its files have.
#
# Expected: from_pretrained(folder, dtype=torch.bfloat16) gives every weight that is not in 4 bit the type asked for, as it does
#           where the unquantised folder is quantised on loading.
# Seen:     tensors named "weight" (embeddings, norms, whole layers) keep the type of the file, all others (biases) get the one
#           asked for. Nothing is said; the forward pass fails in the first layer that has both.
#
# Output seen:
#   quantised on loading: {'bfloat16': ['bias', 'weight']}
#   saved in 4 bit, then loaded: {'bfloat16': ['bias'], 'float32': ['weight']}
#   forward: self and mat2 must have the same dtype, but got BFloat16 and Float
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet \
  torch==2.14.1 numpy==2.4.6 transformers==5.24.0 bitsandbytes==0.50.2 accelerate==1.15.0
cd "$folder"
CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" - > said <<'PYTHON'
import torch
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()


def types(model: torch.nn.Module) -> dict[str, list[str]]:
    """Last parts of the names of floating point tensors, by their type."""
    kinds: dict[str, set[str]] = {}
    for name, value in model.named_parameters():
        if value.is_floating_point():
            kinds.setdefault(str(value.dtype).removeprefix("torch."), set()).add(name.rpartition(".")[2])
    return {kind: sorted(ends) for kind, ends in sorted(kinds.items())}


sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=1, vocab_size=100, **sizes)).save_pretrained("whole")
# q_proj stays whole, and has a bias.
four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "q_proj"])
Qwen2ForCausalLM.from_pretrained("whole", quantization_config=four, device_map="cpu").save_pretrained("packed")
wish = {"dtype": torch.bfloat16, "device_map": "cpu"}
print("quantised on loading:", types(Qwen2ForCausalLM.from_pretrained("whole", quantization_config=four, **wish)))
model = Qwen2ForCausalLM.from_pretrained("packed", **wish)
print("saved in 4 bit, then loaded:", types(model))
try:
    model(torch.ones(1, 3, dtype=torch.int64))
    print("forward: runs")
except RuntimeError as error:
    print("forward:", error)
PYTHON
cat said
cat > expected <<'TEXT'
quantised on loading: {'bfloat16': ['bias', 'weight']}
saved in 4 bit, then loaded: {'bfloat16': ['bias'], 'float32': ['weight']}
forward: self and mat2 must have the same dtype, but got BFloat16 and Float
TEXT
cmp -s said expected
