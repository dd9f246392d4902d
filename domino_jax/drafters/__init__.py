"""Drafters: what proposes a block of tokens for the target to verify."""
