"""The check of a data set before training: errors, warnings and statistics of every record."""
