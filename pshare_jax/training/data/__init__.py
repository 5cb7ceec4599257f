"""Training data: files to packed batches."""
