"""Conversation templates: a Sample becomes ids and labels."""
