"""Folders of models and adapters: where they are, what kind they are, and what their JSON files may say; no torch."""
