"""Memory estimates of a training step, computed on the meta device: no weights are read and no GPU is used."""
