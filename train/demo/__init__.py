"""The shipped pair from nothing: text, a small target, prompts, its drafter."""
