"""Text as a model reads it: tokens with roles, positions among them, examples and batches."""

from reftlens.text.batch import Source, join, resampled

__all__ = ["Source", "join", "resampled"]
