"""Batching: sample lengths, packing, samplers and dataloaders."""
