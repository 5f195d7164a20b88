"""Encoding: from ``Sample`` to ``Example`` (tensors of one sample), and collation into batches."""
