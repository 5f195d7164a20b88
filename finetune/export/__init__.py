"""Exports results of training: merged models, the layout for vLLM, weights consolidated from ZeRO shards."""
