#!/bin/sh
# peft 0.21.2 (transformers 5.24.0, torch 2.14.1) and names in LoraConfig that the model does not have.
#
# Expected: a name in modules_to_save that no module has is refused or at least warned of, as one in target_modules is: the
#           user asked for that module to be trained in full and saved.
# Seen:     it is accepted in silence and written into adapter_config.json; the module is neither trained nor saved. Who
#           mistypes a projector's name gets an adapter without it.
#
# Output seen:
#   target_modules=['visual_projector']: NoMatchingPeftModuleError
#   modules_to_save=['lm_head', 'visual_projector']: accepted, 0 warnings
#   trained besides LoRA: ['lm_head']
#   adapter_config.json says: ['lm_head', 'visual_projector']
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet peft==0.21.2 transformers==5.24.0 torch==2.14.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
import warnings
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def model():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


try:
    get_peft_model(model(), LoraConfig(target_modules=["visual_projector"]))
    refused = "accepted"
except Exception as error:
    refused = type(error).__name__
print(f"target_modules=['visual_projector']: {refused}")

wanted = ["lm_head", "visual_projector"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    adapted = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], modules_to_save=wanted))
about = [str(warning.message) for warning in caught if "visual_projector" in str(warning.message)]
print(f"modules_to_save={wanted}: accepted, {len(about)} warnings")
trained = {name.split(".")[2] for name, weight in adapted.named_parameters() if weight.requires_grad and "lora" not in name}
print(f"trained besides LoRA: {sorted(trained)}")
adapted.save_pretrained("adapter")
noted = json.loads(Path("adapter/adapter_config.json").read_text())["modules_to_save"]
print(f"adapter_config.json says: {noted}")
sys.exit(not (refused == "NoMatchingPeftModuleError" and not about and trained == {"lm_head"} and noted == wanted))
PYTHON
