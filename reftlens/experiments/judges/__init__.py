"""Texts rated and compared by a judge, which is any callable, or an endpoint."""
