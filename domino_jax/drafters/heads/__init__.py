"""Heads that correct the logits of a block drafter."""
