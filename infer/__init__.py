"""What a user runs: `python -m infer`, and its measurements."""
