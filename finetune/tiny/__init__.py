"""Tiny checkpoints with random weights and a demo data set, for tests and demos."""
