"""Checkpoints and results: saved, checked, resumed, verified."""
