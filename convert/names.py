"""The one table between Hugging Face tensors and our weights; import and export read the same rows.

A row is: the Hugging Face name, our path, and the einops pattern from their layout to ours. `{i}`
stands for a layer's number. The letters are those of the legend in `domino_jax.config`.
"""

from dataclasses import dataclass

from einops import rearrange

from domino_jax.config import DecoderConfig, TargetConfig
from domino_jax.weights import axes, flatten

LAYER = (
    ("layers.{i}.input_layernorm.weight", "layers.{i}.input_norm", "D -> D"),
    ("layers.{i}.self_attn.q_proj.weight", "layers.{i}.q", "(N H) D -> D N H"),
    ("layers.{i}.self_attn.k_proj.weight", "layers.{i}.k", "(K H) D -> D K H"),
    ("layers.{i}.self_attn.v_proj.weight", "layers.{i}.v", "(K H) D -> D K H"),
    ("layers.{i}.self_attn.q_norm.weight", "layers.{i}.q_norm", "H -> H"),
    ("layers.{i}.self_attn.k_norm.weight", "layers.{i}.k_norm", "H -> H"),
    ("layers.{i}.self_attn.o_proj.weight", "layers.{i}.o", "D (N H) -> N H D"),
    ("layers.{i}.post_attention_layernorm.weight", "layers.{i}.mlp_norm", "D -> D"),
    ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.gate", "F D -> D F"),
    ("layers.{i}.mlp.up_proj.weight", "layers.{i}.up", "F D -> D F"),
    ("layers.{i}.mlp.down_proj.weight", "layers.{i}.down", "D F -> F D"),
)
TARGET = (
    ("model.embed_tokens.weight", "embed", "V D -> V D"),
    *((f"model.{name}", path, pattern) for name, path, pattern in LAYER),
    ("model.norm.weight", "norm", "D -> D"),
    ("lm_head.weight", "lm_head", "V D -> V D"),
)
DRAFT = (
    ("fc.weight", "fc", "D LD -> LD D"),
    ("hidden_norm.weight", "context_norm", "D -> D"),
    *LAYER,
    ("norm.weight", "norm", "D -> D"),
    ("prefix_gru.weight_ih_l0", "head.gru_in", "GU D -> D GU"),
    ("prefix_gru.weight_hh_l0", "head.gru_state", "GU U -> U GU"),
    ("embed_proj.0.weight", "head.proj_in", "R DU -> DU R"),
    ("embed_proj.2.weight", "head.proj_out", "V R -> V R"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of one model: its two names and its two layouts."""

    hf_name: str
    path: str
    pattern: str
    hf_shape: tuple[int, ...]
    sizes: tuple[tuple[str, int], ...]

    def to_ours(self, tensor):
        """An array in Hugging Face's layout, in ours (a view where NumPy can give one)."""
        return rearrange(tensor, self.pattern, **self._named())

    def to_hf(self, array):
        """An array in our layout, in Hugging Face's."""
        theirs, ours = self.pattern.split(" -> ")
        return rearrange(array, f"{ours} -> {theirs}", **self._named())

    def _named(self) -> dict[str, int]:
        return {letter: size for letter, size in self.sizes if letter in self.pattern.split(" -> ")[1].split()}


def entries(config: DecoderConfig) -> list[Entry]:
    """Every tensor that a model of this config has, in our tree's order.

    Raises:
        KeyError: a weight of ours has no row in the table (a mistake in this file).
    """
    table = TARGET if isinstance(config, TargetConfig) else DRAFT
    rows = {
        path.format(i=i): (name.format(i=i), pattern)
        for name, path, pattern in table
        for i in range(config.num_hidden_layers)
    }
    sizes = config.sizes
    made = []
    for path, letters in flatten(axes(config)).items():
        name, pattern = rows[path]
        theirs, ours = pattern.split(" -> ")
        assert ours == letters, f"{path}: the table says {ours}, the module {letters}"
        shape, inside = [], None
        for word in theirs.replace("(", "( ").replace(")", " )").split():
            if word == "(":
                inside = 1
            elif word == ")":
                shape.append(inside)
                inside = None
            elif inside is None:
                shape.append(sizes[word])
            else:
                inside *= sizes[word]
        made.append(Entry(name, path, pattern, tuple(shape), tuple(sizes.items())))
    return made
