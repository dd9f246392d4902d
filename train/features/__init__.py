"""Captured features: what the target made of a corpus, on disk."""
