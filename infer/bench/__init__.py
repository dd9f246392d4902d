from infer.bench.command import main

__all__ = ["main"]
