"""A Sample becomes tensors."""
