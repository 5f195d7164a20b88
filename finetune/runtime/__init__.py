"""Processes of a run: exit codes, signals, ranks."""
