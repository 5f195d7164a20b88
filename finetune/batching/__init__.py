"""Lengths, packing, samplers and dataloaders."""
