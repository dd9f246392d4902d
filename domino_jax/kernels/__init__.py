"""Kernels for one kind of device, chosen only where they were tested on it."""
