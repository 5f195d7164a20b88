"""Self-contained HTML pages without network access: data preview, training and evaluation reports."""
