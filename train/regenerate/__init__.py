"""Training data in the target's own words: it rewrites the answers of conversations."""
