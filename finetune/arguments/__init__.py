"""Command-line flags of training: dataclasses, YAML files, LLaMA-Factory keys, legacy names, origins of values."""
