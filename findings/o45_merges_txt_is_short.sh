#!/bin/sh
# MiniCPM-o 4.5's tokenizer as the package minicpm-o5-sdk 0.0.6 ships it (base_tokenizers/qwen2_o45_fc), tokenizers 0.23.3.
#
# Expected: tokenizer.json, and vocab.json with merges.txt beside it, are two forms of one tokenizer and give equal ids.
# Seen:     merges.txt has 134935 merges, tokenizer.json 151387. No file says so, nothing is raised. English is written alike;
#           Chinese words are cut into shorter tokens, which a model trained with tokenizer.json does not expect there.
#
# Output seen:
#   merges: 151387 in tokenizer.json, 134935 in merges.txt
#   vocabulary entries that no merge builds: 16452
#   'The picture shows three desserts.': equal
#   '始终坚持以人民为中心': 4 and 10 tokens
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet tokenizers==0.23.3
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$folder/sdk" minicpm-o5-sdk==0.0.6
"$folder/venv/bin/python" - "$folder/sdk/minicpm_o5_sdk/tokenizers/base_tokenizers/qwen2_o45_fc" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

folder = Path(sys.argv[1])
whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
short = [line.split(" ") for line in lines if line and not line.startswith("#version")]
print(f"merges: {len(whole['model']['merges'])} in tokenizer.json, {len(short)} in merges.txt")
built = {left + right for left, right in short}
added = {token["content"] for token in whole["added_tokens"]}
vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
lost = [entry for entry in vocabulary if len(entry) > 1 and entry not in built and entry not in added]
print(f"vocabulary entries that no merge builds: {len(lost)}")

one = Tokenizer.from_str(json.dumps(whole))
whole["model"]["merges"] = short
other = Tokenizer.from_str(json.dumps(whole))
changed = len(lost) != 16452
for text, wanted in (("The picture shows three desserts.", True), ("始终坚持以人民为中心", False)):
    ids, others = one.encode(text).ids, other.encode(text).ids
    print(f"{text!r}: {'equal' if ids == others else f'{len(ids)} and {len(others)} tokens'}")
    changed |= (ids == others) != wanted or (not wanted and (len(ids), len(others)) != (4, 10))
sys.exit(int(changed))
PYTHON
