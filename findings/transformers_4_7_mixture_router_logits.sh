#!/bin/sh
# transformers 5.24.0: MiniCPM-V 4.7 with a mixture of experts (text model qwen3_5_moe_text), as of 4.7-35B-A3B.
#
# Expected: output_router_logits, a published setting of the text model, gives router logits, an auxiliary loss, or nothing;
#           in 5.23.0 the forward pass ran and both loss and logits were the same with and without it.
# Seen:     every forward pass fails, because the router logits of the text model are handed to an output class that has no
#           such field.
#
# Output seen:
#   without: loss 4.0671
#   with: TypeError: MultimodalBaseModelOutputWithPast.__init__() got an unexpected keyword argument 'router_logits'
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet \
  torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow==13.0.0 numpy==2.4.6
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration

text = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}
vision = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
torch.manual_seed(0)
config = MiniCPMV4_7Config(text_config=text, vision_config=vision, insert_layer_id=0, image_token_id=60, video_token_id=61)
model = MiniCPMV4_7ForConditionalGeneration(config).eval()
ids = torch.arange(1, 9)[None]
print(f"without: loss {model(input_ids=ids, labels=ids).loss.item():.4f}")
model.config.text_config.output_router_logits = True
try:
    print(f"with: loss {model(input_ids=ids, labels=ids).loss.item():.4f}")
except TypeError as error:
    print(f"with: TypeError: {error}")
    sys.exit(0 if "router_logits" in str(error) else 1)
sys.exit(1)
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
