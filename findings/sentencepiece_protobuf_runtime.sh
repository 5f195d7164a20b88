#!/bin/sh
# sentencepiece 0.2.3, protobuf 6.33.6 (the newest that wandb 0.25 and swanlab 0.10 allow), transformers 5.24.0.
#
# Expected: sentencepiece declares no bound for protobuf, so its module that describes a tokenizer.model imports with any
#           supported one, as that of 0.2.2 does; and where it does not, transformers, which has such a module of its own,
#           takes that.
# Seen:     pip finds nothing to complain about, and the import of sentencepiece_model_pb2 raises VersionError, since the file was
#           generated for protobuf 7.36.1. transformers prefers that file whenever sentencepiece is installed: its conversion of
#           a tokenizer.model fails the same way, where it works without sentencepiece.
#
# Output seen:
#   pip check: No broken requirements found.
#   sentencepiece 0.2.3: VersionError
#   transformers: VersionError
#   sentencepiece 0.2.2: imported
#   transformers: sentencepiece.sentencepiece_model_pb2
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
cat > "$folder/look.py" <<'PYTHON'
from importlib.metadata import version

try:
    from sentencepiece import sentencepiece_model_pb2
    print(f"sentencepiece {version('sentencepiece')}: imported")
except Exception as error:
    print(f"sentencepiece {version('sentencepiece')}: {type(error).__name__}")
try:
    from transformers.convert_slow_tokenizer import import_protobuf
    print(f"transformers: {import_protobuf().__name__}")
except Exception as error:
    print(f"transformers: {type(error).__name__}")
PYTHON
cd "$folder"
"$python" -m pip --disable-pip-version-check install --quiet transformers==5.24.0 sentencepiece==0.2.3 protobuf==6.33.6
{
  echo "pip check: $("$python" -m pip --disable-pip-version-check check)"
  "$python" look.py 2>> errors
  "$python" -m pip --disable-pip-version-check install --quiet sentencepiece==0.2.2
  "$python" look.py 2>> errors
} > said
cat said
cat > expected <<'TEXT'
pip check: No broken requirements found.
sentencepiece 0.2.3: VersionError
transformers: VersionError
sentencepiece 0.2.2: imported
transformers: sentencepiece.sentencepiece_model_pb2
TEXT
cmp -s said expected
