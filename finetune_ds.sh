#!/bin/sh
# Full finetuning with DeepSpeed: language model, resampler and vision tower.
#
#   sh finetune_ds.sh [flags of finetune.py]     from any directory; DRY_RUN=1 prints the command instead
#   sh finetune_ds.sh FILE.yaml [flags]          flags from a file in place of the variables, also one of LLaMA-Factory
#
# Edit the variables or set them in the environment. Flags given on the command line win over everything here.
set -eu

GPUS_PER_NODE=${GPUS_PER_NODE:-} # empty: the visible GPUs, or 2 CPU processes where there is none
TORCHRUN=${TORCHRUN:-} # empty: torchrun's own Python interface (finetune/launch.py); a program is called in its place
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-} # empty: a free port on one node, 6001 on several

MODEL=${MODEL:-"openbmb/MiniCPM-Llama3-V-2_5"} # or openbmb/MiniCPM-V-2, or a local folder
DATA=${DATA:-"path/to/trainging_data"} # json file
EVAL_DATA=${EVAL_DATA:-"path/to/test_data"} # json file; left as it is: no evaluation
LLM_TYPE=${LLM_TYPE:-} # empty: detected; a value is only checked: llama3, for openbmb/MiniCPM-V-2 minicpm
MODEL_MAX_Length=${MODEL_MAX_Length:-2048}
DOWNSAMPLE_MODE=${DOWNSAMPLE_MODE:-} # of 4.6 and later, 16x or 4x; empty: the checkpoint's
OUTPUT_DIR=${OUTPUT_DIR:-"output/output_full"}
DS_CONFIG=${DS_CONFIG:-} # empty: ds_config_zero2.json; to save memory ds_config_zero3.json or one of the *_offload.json
export CUDA_VISIBLE_DEVICES HF_HOME HF_ENDPOINT DOWNSAMPLE_MODE

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PATH=$PATH:$here/.venv/bin # for torchrun and python3 where no environment is active
problem() {
  echo "$0: $1" >&2
  [ "${DRY_RUN:-0}" != 0 ] || exit 2
}

run() { # MODULE [argument ...]: by the Python that torchrun belongs to; a TORCHRUN that is none is called instead
  module=$1
  shift
  program=${TORCHRUN:-${PYTHON:-torchrun}}
  path=$(command -v "$program") || problem "no $program; install with: python3 -m pip install -r '$here/requirements.txt'"
  if [ -z "${TORCHRUN:-}${PYTHON:-}" ] && grep -qs 'torch.distributed.run' "$path"; then
    program=$(dirname "$path")/python3 # of the environment that torchrun belongs to
    [ -x "$program" ] || program=python3
  elif [ -z "${PYTHON:-}" ] || [ -n "${TORCHRUN:-}" ]; then
    set -- "$program" "$@"
    program=
  fi
  # torchrun, with statuses that say how a run ended, time to save when it is told to stop, and nothing left behind.
  [ -z "$program" ] || set -- env PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$program" -m "$module" "$@"
  [ "${DRY_RUN:-0}" != 0 ] || exec "$@"
  for arg do # quoted for the shell
    printf "'%s' " "$(printf '%s' "$arg" | sed "s/'/'\\\\''/g")"
  done
  echo
  exit
}
[ -e "$here/finetune.py" ] || {
  echo "$0: no finetune.py in '$here'; leave this script in its repository and call it from anywhere" >&2
  exit 2
}

# A file of flags: python -m finetune train, with what the variables say about processes.
case ${1:-} in
  *.yaml | *.yml)
    [ -z "$TORCHRUN" ] || problem "TORCHRUN has no effect on the file '$1'; unset it"
    echo "$0: the flags are those of $1; MODEL, DATA and the other variables are not used" >&2
    [ "$NNODES" = 1 ] || set -- --nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" "$@"
    [ -z "$MASTER_PORT" ] || set -- --master_port "$MASTER_PORT" "$@"
    [ -z "$GPUS_PER_NODE" ] || set -- --nproc "$GPUS_PER_NODE" "$@"
    run finetune train --method full "$@"
    ;;
esac

# Check the files once here, before every process fails on its own. User paths belong to the caller's directory.
[ "$EVAL_DATA" != "path/to/test_data" ] || EVAL_DATA=
flag=
for arg do
  case $flag in --data_path) DATA=$arg ;; --eval_data_path) EVAL_DATA=$arg ;; esac
  case $arg in --data_path=*) DATA=${arg#*=} ;; --eval_data_path=*) EVAL_DATA=${arg#*=} ;; esac
  flag=$arg
done
[ -e "$DATA" ] || problem "no data file '$DATA'; set DATA at the top of the script or in the environment"
[ -z "$EVAL_DATA" ] || [ -e "$EVAL_DATA" ] || problem "no data file '$EVAL_DATA'; set EVAL_DATA, or empty it to train without"
case $DS_CONFIG in
  "") DS_CONFIG=$here/ds_config_zero2.json ;;
  cpu_low_memo) DS_CONFIG=$here/ds_config_zero2_offload.json ;; # its name in an older guide
  *) [ -e "$DS_CONFIG" ] || [ ! -e "$here/$DS_CONFIG" ] || DS_CONFIG=$here/$DS_CONFIG ;;
esac
[ -e "$DS_CONFIG" ] || problem "no DeepSpeed configuration '$DS_CONFIG' here or in '$here'; set DS_CONFIG"

# What the user gave: the variables above, then the flags. The launcher's own defaults go in front of these;
# finetune.py prints the user's (the last FINETUNE_USER_ARGS arguments) and writes both to run.yaml.
[ -z "$LLM_TYPE" ] || set -- --llm_type "$LLM_TYPE" "$@"
[ -z "$EVAL_DATA" ] || set -- --eval_data_path "$EVAL_DATA" "$@"
[ "$MODEL_MAX_Length" = 2048 ] || set -- --model_max_length "$MODEL_MAX_Length" "$@"
set -- --model_name_or_path "$MODEL" --data_path "$DATA" --output_dir "$OUTPUT_DIR" "$@"
export FINETUNE_USER_ARGS=$#

# The method: what differs between finetune_ds.sh and finetune_lora.sh.
set -- --tune_vision true --tune_llm true --learning_rate 1e-5 "$@"

# Steps below 1 are a fraction of all steps: evaluated and saved ten times, whatever the size of the data.
[ -z "$EVAL_DATA" ] || set -- --do_eval true --eval_strategy steps --eval_steps 0.1 "$@"
set -- --deepspeed "$DS_CONFIG" --do_train true --model_max_length 2048 --max_slice_nums 9 \
  --num_train_epochs 3 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 8 \
  --weight_decay 0.1 --adam_beta2 0.95 --warmup_steps 0.01 --lr_scheduler_type cosine --gradient_checkpointing true \
  --save_strategy steps --save_steps 0.1 --save_total_limit 2 --logging_steps 1 --report_to tensorboard \
  --remove_unused_columns false --label_names labels "$@"

# CUDA's own rule: the list of visible devices ends at the first negative one.
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | sed '/^ *-/,$d' | grep -c '[^ ]') || gpus=0
else
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || gpus=0
fi
if [ "$gpus" = 0 ]; then # one thread per process: more of them only get in each other's way
  gpus=2
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
if [ -z "$MASTER_PORT" ]; then
  MASTER_PORT=6001
  find_port='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
  [ "$NNODES" != 1 ] || MASTER_PORT=$("${PYTHON:-python3}" -c "$find_port")
fi

# "--" keeps torchrun from reading the script's flags as abbreviations of its own.
set -- --nproc_per_node "${GPUS_PER_NODE:-$gpus}" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -- "$here/finetune.py" "$@"
run finetune.launch "$@"
