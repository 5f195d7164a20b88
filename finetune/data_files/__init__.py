"""Data files as records: JSON, JSON Lines, Parquet, Arrow, CSV, WebDataset, streams and indexes."""
