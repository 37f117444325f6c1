"""Text as a model reads it: tokens with roles, positions among them, examples and batches."""
