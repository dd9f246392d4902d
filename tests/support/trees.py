"""Trees of drafts restated in plain Python: the best-first search, its form with few lanes, and the walk."""

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import reference

Following = Callable[[tuple[int, ...]], dict[int, float]]  # tokens from the anchor on -> log-probabilities of the next
Nodes = list[tuple[int, int]]  # a token, and the place of its parent: 0 is the anchor, i + 1 the i-th of the list


def best_first(following: Following, nodes: int, depth: int) -> Nodes:
    """The likeliest node that is not yet in the tree joins it, again and again; its children may follow then."""
    heap: list[tuple[float, int, tuple[int, ...], int]] = [(0.0, 0, (), 0)]  # minus the score, its number, path, parent
    found, seen = [], 0
    while heap and len(found) < nodes + 1:
        score, _, path, parent = heapq.heappop(heap)
        found.append((path[-1] if path else -1, parent))
        if len(path) < depth:
            for token, logp in following(path).items():
                seen += 1
                if logp > -np.inf:
                    heapq.heappush(heap, (score - logp, seen, (*path, token), len(found) - 1))
    return found[1:]


def by_depth(following: Following, nodes: int, depth: int, lanes: int) -> Nodes:
    """Only the likeliest paths of each depth have children; of all that were scored the likeliest are the tree."""
    level: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    scored: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(depth):
        children = [(s + logp, (*p, t)) for s, p in level for t, logp in following(p).items()]
        scored += children
        level = sorted(children, key=lambda child: -child[0])[:lanes]
    chosen = sorted(scored, key=lambda child: (-child[0], len(child[1])))[:nodes]
    places = {(): 0} | {path: i + 1 for i, (_, path) in enumerate(chosen)}
    return [(path[-1], places[path[:-1]]) for _, path in chosen]


def head_following(
    draft_w: dict[str, np.ndarray],
    draft_cfg: dict,
    embed: np.ndarray,
    z: np.ndarray,
    base: np.ndarray,
    anchor: int,
    candidates: Sequence[Sequence[int]] | None = None,
    shared: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    noise: np.ndarray | None = None,
) -> Following:
    """What a head says of a block [J, D] with base logits [J, V], by docs/algorithm.md, sections 4 and 10.

    Args:
        candidates: at each place those that are scored; the vocabulary when None.
        shared: every path is corrected as the likeliest one.
        noise: [J, V], with which the target draws a token; where there is some, all but the `top_k` likeliest are out.
    """
    head = reference.has_head(draft_cfg)
    markov, selector = reference.has_markov(draft_cfg), reference.has_selector(draft_cfg)
    prefix = reference.prefix_length(draft_cfg, draft_cfg["block_size"]) if head else 0 if markov else len(z)

    def scores(path: tuple[int, ...]) -> tuple[np.ndarray, Sequence[int]]:
        place = len(path)
        logits, names = reference.f64(base[place]), range(base.shape[1])
        if markov:
            before = (anchor, *path)
            logits = logits + reference.markov_correction(draft_w, draft_cfg, before, z[: place + 1])[place]
            names = names if candidates is None else candidates[place]
        elif selector:
            before = path[-1] if path else anchor
            logits = reference.selector_logits(draft_w, draft_cfg, base[place], z[place], before)
        elif place >= prefix:
            state = np.zeros(np.asarray(draft_w["prefix_gru.weight_hh_l0"]).shape[1])
            for token in (anchor, *path):
                state = reference.gru_step(draft_w, reference.f64(embed[token]), state)
            logits = logits + reference.head_correction(draft_w, z[place], state)
            names = names if candidates is None else candidates[place]
        logits = logits[list(names)] / temperature
        if noise is None:
            return logits, names
        lowest = np.sort(logits)[-top_k] if 0 < top_k < len(logits) else -np.inf
        return np.where(logits < lowest, -np.inf, logits) + noise[place][list(names)], names

    greedy: tuple[int, ...] = ()
    while shared and len(greedy) < len(z):
        logits, names = scores(greedy)
        greedy = (*greedy, int(names[int(np.argmax(logits))]))

    def following(path: tuple[int, ...]) -> dict[int, float]:
        logits, names = scores(greedy[: len(path)] if shared else path)
        total = np.logaddexp.reduce(logits)
        return {int(name): float(logit - total) for name, logit in zip(names, logits, strict=True)}

    return following


def walk(tokens: Sequence[int], parents: Sequence[int], choices: Sequence[int]) -> list[int]:
    """The path that the target takes, as places: 0 for the anchor, i + 1 for the i-th node.

    Args:
        choices: the target's own token after the anchor, and after each node.
    """
    path = [0]
    while True:
        children = [i + 1 for i, parent in enumerate(parents) if parent == path[-1]]
        following = [i for i in children if tokens[i - 1] == choices[path[-1]]]
        if not following:
            return path
        path.append(following[0])
