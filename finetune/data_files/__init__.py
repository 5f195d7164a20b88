"""Data files as sequences or streams of records: JSON, JSON Lines, Parquet, Arrow, CSV, WebDataset, hub data sets."""
