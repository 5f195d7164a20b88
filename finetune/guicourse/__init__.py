"""GUICourse (Chen et al., 2024, arXiv 2406.11317): conversion to training data, and scoring of predictions."""
