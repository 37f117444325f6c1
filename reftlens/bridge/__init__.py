"""What is used of TransformerLens: the protocol of a bridged model, loading one, its fingerprint, hooks of others."""
