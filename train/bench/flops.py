"""Floating-point operations of a training step, counted from the models' shapes."""

import math

from domino_jax.config import DecoderConfig, DraftConfig, TargetConfig
from domino_jax.drafters.heads import head_of
from domino_jax.weights import axes, flatten, is_matrix


def flops(target: TargetConfig, config: DraftConfig, rows: int, length: int, count: int) -> dict[str, float]:
    """Floating-point operations of one step over `rows` sequences: 2 for each weight and token of a product.

    target    A forward pass: 2 · (weights of the layers) a token, and attention's two products over the T / 2
              positions that a query sees on average, 2 · 2 · N·H · T / 2 a token and layer.
    forward   The drafter's: its layers over A·M rows, fc and each layer's keys and values over the context, attention
              over T / 2 + M positions (anchors are anywhere), and over A·J proposals the LM head and the head's
              matrices.
    backward  One product for the input and one for the weight of each product of the forward pass, less the frozen LM
              head's weight and fc's input.
    """
    sizes, target_sizes = config.sizes, target.sizes
    tokens, block_rows, proposals = rows * length, rows * count * config.block_size, rows * count * config.num_proposals
    attention = 4 * config.num_attention_heads * config.head_dim * (length / 2 + config.block_size)

    def layer(config: DecoderConfig) -> int:
        letters = flatten(axes(config).layers[0])
        return sum(
            math.prod(config.sizes[x] for x in names.split())
            for path, names in letters.items()
            if is_matrix(path, names)
        )

    target_attention = 4 * target.num_attention_heads * target.head_dim * length / 2
    of_target = target.num_hidden_layers * (2 * layer(target) + target_attention) * tokens
    keys_values = 2 * sizes["D"] * sizes["K"] * sizes["H"]
    fc = 2 * sizes["LD"] * sizes["D"] * tokens
    layers = config.num_hidden_layers * ((2 * layer(config) + attention) * block_rows + 2 * keys_values * tokens)
    lm_head = 2 * target_sizes["V"] * target_sizes["D"] * proposals
    head = 0
    for product in head_of(config).products(axes(config).head, config.num_proposals):
        head += sum(2 * math.prod(sizes[x] for x in letters.split()) for letters in product.matrices) * proposals
    forward = fc + layers + head + lm_head
    return {"target": of_target, "forward": forward, "backward": fc + 2 * (layers + head) + lm_head}
