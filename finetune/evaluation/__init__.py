"""Evaluation: batched generation, metrics, reports and training curves."""
