#!/bin/sh
# transformers 5.24.0, tokenizers 0.23.3: tokenizer_config.json names an eos_token that tokenizer.json does not have.
#
# Expected: an error or a warning: the two files disagree, and no row of the embedding belongs to such a token.
# Seen:     AutoTokenizer adds the token behind the vocabulary without a word. Its id is the size of the vocabulary, one past
#           the last row of a model of that size: trained as the end of an answer it is an index error on a CPU, and a
#           generation that looks for it never ends.
#
# Output seen:
#   entries in tokenizer.json: 4
#   eos_token '<|im_end|>' has id 4, len(tokenizer) 5, 0 warnings
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" - 2> said <<'PYTHON'
import json
import sys
import warnings
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

Path("model").mkdir()
vocabulary = {"a": 0, "b": 1, "</s>": 2, "<unk>": 3}
Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save("model/tokenizer.json")
named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
Path("model/tokenizer_config.json").write_text(json.dumps(named))
print(f"entries in tokenizer.json: {len(vocabulary)}")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tokenizer = AutoTokenizer.from_pretrained("model")
about = [warning for warning in caught if "im_end" in str(warning.message)]
print(f"eos_token {tokenizer.eos_token!r} has id {tokenizer.eos_token_id}, len(tokenizer) {len(tokenizer)}, {len(about)} warnings")
sys.exit(not (tokenizer.eos_token_id == len(vocabulary) and not about))
PYTHON
if grep -q "im_end" said; then echo "it is said on stderr now"; exit 1; fi
