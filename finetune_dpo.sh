#!/bin/sh
# Preference training (docs/preferences.md): finetune_lora.sh with --stage dpo, and the same variables and arguments.
case ${1:-} in *.yaml | *.yml) file=$1 && shift && set -- "$file" --stage dpo "$@" ;; *) set -- --stage dpo --learning_rate 5e-6 "$@" ;; esac
exec sh "$(dirname -- "$0")/finetune_lora.sh" "$@"
