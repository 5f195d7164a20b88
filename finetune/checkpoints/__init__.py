"""Saving, checking, resuming and verifying checkpoints and results."""
