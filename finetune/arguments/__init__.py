"""Flags of training: dataclasses, YAML files, LLaMA-Factory keys, legacy names, and where each value comes from."""
