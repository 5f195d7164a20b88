"""Prompt templates: from a ``Sample`` to token ids and labels."""
