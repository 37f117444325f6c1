"""What is kept of a trained `ReFT`: folders, the hub, other libraries' formats, plain transformers, merged weights."""
