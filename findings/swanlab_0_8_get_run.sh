#!/bin/sh
# swanlab 0.10.3 (the same from 0.8.5 on), transformers 5.24.0.
#
# Expected: report_to="swanlab" trains: transformers asks swanlab for a run that is active, gets None and starts one, as with
#           swanlab 0.7.20.
# Seen:     swanlab.get_run() raises RuntimeError where it returned None, and transformers has no case for that: the callback ends
#           training before step 1, in every mode, also where nothing was configured wrong.
#
# Output seen:
#   swanlab 0.7.20: a run is started, mode offline
#   swanlab 0.10.3: RuntimeError: No active Run. Call swanlab.init() first.
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
cd "$folder"
cat > look.py <<'PYTHON'
from types import SimpleNamespace

import swanlab
from transformers import TrainerState
from transformers.integrations import SwanLabCallback

callback = SwanLabCallback()
state = TrainerState()
state.is_world_process_zero = True
arguments = SimpleNamespace(to_dict=dict, run_name="run", logging_dir="logs", resume_from_checkpoint=None)
try:
    callback.setup(arguments, state, None)
    started = swanlab.get_run() is not None
    print(f"swanlab {swanlab.__version__}: {'a run is started' if started else 'no run'}, mode offline")
except RuntimeError as error:
    print(f"swanlab {swanlab.__version__}: RuntimeError: {error}")
PYTHON
export SWANLAB_MODE=offline SWANLAB_LOG_DIR="$folder/logs"
for version in 0.7.20 0.10.3; do
  "$python" -m pip --disable-pip-version-check install --quiet transformers==5.24.0 torch==2.14.1 "swanlab==$version"
  "$python" look.py 2> errors | grep '^swanlab [0-9.]*: ' || cat errors
done > said
cat said
cat > expected <<'TEXT'
swanlab 0.7.20: a run is started, mode offline
swanlab 0.10.3: RuntimeError: No active Run. Call swanlab.init() first.
TEXT
cmp -s said expected
