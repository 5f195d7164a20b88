"""Generation and metrics."""
