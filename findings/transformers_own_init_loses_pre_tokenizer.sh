#!/bin/sh
# transformers 5.24.0: a tokenizer class in a folder's own code file, derived from PreTrainedTokenizerFast with an __init__
# that only calls its parent, as the one of MiniCPM-Llama3-V 2.5 is. (servers load it so: vLLM with --trust-remote-code)
#
# Expected: ids as tokenizer.json gives them, with the class and without it, as in transformers 4.57.6.
# Seen:     the pre-tokenizer and the decoder of tokenizer.json are dropped in silence: other ids, spaces are lost.
#
# Output seen:
#   tokenizer.json:      [256, 257]
#   class without init:  [256, 257]
#   class with init:     [64, 65, 66]
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet transformers==5.24.0
HF_HOME="$folder/cache" "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
whole = Tokenizer(models.BPE({**letters, "ab": 256, "Ġc": 257}, [("a", "b"), ("Ġ", "c")]))
whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
INIT = "    def __init__(self, **kwargs):\n        super().__init__(**kwargs)\n"


def ids(name: str, body: str) -> list[int]:
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    whole.save(str(folder / "tokenizer.json"))
    head = "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n"
    (folder / "code.py").write_text(head + body)
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True).encode("ab c")


found = {"tokenizer.json": whole.encode("ab c").ids, "class without init": ids("plain", "    pass\n")}
found["class with init"] = ids("init", INIT)
for name, value in found.items():
    print(f"{name + ':':<20} {value}")
sys.exit(found["tokenizer.json"] != found["class without init"] or found["class with init"] == found["tokenizer.json"])
PYTHON
