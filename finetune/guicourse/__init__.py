"""GUICourse (Chen et al., 2024, arXiv 2406.11317): its published files to training data, its scores of predictions."""
