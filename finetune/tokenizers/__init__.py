"""Tokenizers of model folders, built without remote code."""
