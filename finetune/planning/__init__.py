"""What a training step needs in memory, told from sizes alone: no weights are read and no device is used."""
