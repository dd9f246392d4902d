"""A row of figures, and the names of the ways of decoding in it."""

from typing import Any

Row = dict[str, Any]
LEAN, DFLASH, DOMINO, TRANSFORMERS = "lean", "dflash", "domino", "transformers"  # lean: the autoregressive baseline
NGRAM, ASSISTANT, TREE, ORTHRUS = "ngram", "assistant", "tree", "orthrus"
