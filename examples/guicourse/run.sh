#!/bin/sh
# From published GUICourse files to the score table: convert, train, ask the test questions, score.
#
#   sh examples/guicourse/run.sh [flags of finetune.py]     with made-up data and a tiny model: minutes on a CPU
#   PUBLISHED=/public/guicourse MODEL=openbmb/MiniCPM-Llama3-V-2_5 sh examples/guicourse/run.sh     the real thing
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
PYTHON=${PYTHON:-"$root/.venv/bin/python"}
[ -x "$PYTHON" ] || PYTHON=python3
OUT=${OUT:-"output/guicourse"}
PUBLISHED=${PUBLISHED:-} # folder of *_data.json and *_images.parquet; empty: made up
MODEL=${MODEL:-} # empty: a tiny one with random weights
METHODS=${METHODS:-"lora ds"} # LoRA and full
TASKS=${TASKS:-"ocr_grounding web-single web-multi smartphone"}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

mkdir -p "$OUT"
if [ -z "$PUBLISHED" ]; then
  PUBLISHED=$OUT/published
  "$PYTHON" "$here/make_data.py" "$PUBLISHED"
fi
if [ -z "$MODEL" ]; then
  MODEL=$OUT/model
  [ -e "$MODEL" ] || "$PYTHON" -m finetune tiny --family llama3_v2_5 --out "$MODEL"
  # What makes a tiny model learn the form of the answers; a real one keeps the launchers' defaults.
  set -- --learning_rate 2e-3 --num_train_epochs 20 --warmup_steps 0.1 --gradient_checkpointing false \
    --gradient_accumulation_steps 1 --per_device_train_batch_size 8 --logging_steps 20 "$@"
fi

# GUIEnv is trained on its second stage, as in the published preparation.
"$PYTHON" -m finetune guicourse convert --out "$OUT/data" --merge train.json --data "$PUBLISHED/ocr_grounding_train_stage2_data.json" \
  "$PUBLISHED"/web-*_train_data.json "$PUBLISHED/smartphone_train_data.json" "$PUBLISHED/guichat_data.json"
# shellcheck disable=SC2086
for task in $TASKS; do
  "$PYTHON" -m finetune guicourse convert --out "$OUT/data" --data "$PUBLISHED/${task}_test_data.json"
done

for method in $METHODS; do
  DATA="$OUT/data/train.json" EVAL_DATA='' MODEL="$MODEL" OUTPUT_DIR="$OUT/$method" \
    sh "$root/finetune_$method.sh" --overwrite_output_dir true "$@"
  for task in $TASKS; do
    answers=$OUT/answers-$method-$task
    "$PYTHON" -m finetune evaluate --model "$OUT/$method" --data "$OUT/data/${task}_test.json" --out "$answers" --overwrite
    echo "== $method: $task"
    "$PYTHON" -m finetune guicourse score --data "$PUBLISHED/${task}_test_data.json" --pred "$answers/predictions.jsonl" \
      --out "$answers/scores.json"
  done
done
