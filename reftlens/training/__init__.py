"""Training of a `ReFT` on a frozen model."""
