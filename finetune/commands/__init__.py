"""The commands of ``python -m finetune``, one file each."""
