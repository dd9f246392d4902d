"""Training data: rows of files to conversations, to token sequences, to batches."""
