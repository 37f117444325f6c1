"""Answers: read out of texts, scored, and asked for with their letters turned."""
