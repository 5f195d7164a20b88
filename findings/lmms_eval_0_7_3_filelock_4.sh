#!/bin/sh
# lmms_eval 0.7.3 with filelock 4.3.1 (its requirements name no version of filelock; pip takes the newest).
#
# Expected: a task of two rows with the harness' own dummy model is scored and its results are written, as with filelock
#           3.32.7; or, where something fails, an exit status that says so.
# Seen:     lmms_eval/evaluator.py imports filelock._api, a private module that filelock 4 does not have. The error is logged, no
#           results are written, and the command exits 0.
#
# Output seen:
#   filelock 3.32.7: exit status 0, 1 file of results
#   filelock 4.3.1: exit status 0, 0 files of results: No module named 'filelock._api'
# Exits 0 as long as this is so, 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
python=$folder/venv/bin/python
cd "$folder"
mkdir tasks
cat > tasks/tiny.yaml <<'YAML'
task: tiny
dataset_path: parquet
dataset_kwargs: {data_files: {test: table.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function task.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
YAML
printf 'def visual(doc):\n    return []\n' > tasks/task.py
"$python" -m pip --disable-pip-version-check install --quiet lmms_eval==0.7.3 opencv-python-headless
"$python" -c 'from datasets import Dataset; Dataset.from_dict({"question": ["a", "b"], "answer": ["a", "b"]}).to_parquet("table.parquet")' 2> errors
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" CUDA_VISIBLE_DEVICES=
for version in 3.32.7 4.3.1; do
  "$python" -m pip --disable-pip-version-check install --quiet "filelock==$version"
  status=0
  "$python" -m lmms_eval --model dummy --tasks tiny --include_path tasks --output_path "out-$version" --batch_size 1 \
    > log 2>&1 || status=$?
  count=$(find "out-$version" -name '*_results.json' 2> errors | wc -l)
  cause=$(sed -n "s/^ModuleNotFoundError: \(.*\)/: \1/p" log | tail -1)
  [ "$count" = 1 ] && files=file || files=files
  echo "filelock $version: exit status $status, $count $files of results$cause"
done > said
cat said
cat > expected <<'TEXT'
filelock 3.32.7: exit status 0, 1 file of results
filelock 4.3.1: exit status 0, 0 files of results: No module named 'filelock._api'
TEXT
cmp -s said expected
