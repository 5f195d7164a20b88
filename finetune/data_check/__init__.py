"""Data check before training: errors, warnings and statistics of every record."""
