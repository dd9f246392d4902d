"""Checkpoints on disk to arrays and back: Hugging Face safetensors, Orbax."""
