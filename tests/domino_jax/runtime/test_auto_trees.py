"""`AutoTrees` on a simulated machine, and chains, trees and plain steps in turn on a real one."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import factory
import jax.numpy as jnp
import numpy as np
import pytest
from test_auto_drafts import cycles_of

from domino_jax.decode import DecodeConfig
from domino_jax.drafters.dual_view import DualViewConfig
from domino_jax.drafters.tree import TreeDrafter
from domino_jax.drafters.view_tree import DualViewTreeDrafter
from domino_jax.runtime.auto import AutoDrafts
from domino_jax.runtime.auto_trees import AutoTrees, auto_policy
from domino_jax.runtime.slots import STEPS_PER_CYCLE, Completion, Request, Slots
from domino_jax.sampling import SamplingParams

CASE = (1, True, 256)
CHAIN, TREE, SMALL = 7, 20, 10
DEPTH = 7


class Machine:
    """Runs dispatches in simulated time, one plain step of which takes about 1.

    Args:
        seconds: of a cycle, by drafts.
        chance: that the next token of a path is drafted, in a chain and in trees.
    """

    def __init__(self, seconds: dict[int, float], chance: tuple[float, float, float]):
        self.seconds: dict[int, float] = {0: 1.0} | seconds
        self.chance: dict[int, float] = dict(zip((CHAIN, TREE, SMALL), chance, strict=True))
        self.rng, self.time, self.tokens, self.uses = np.random.default_rng(0), 0.0, 0, Counter()
        self.ready: Callable[[int], bool] = lambda drafts: True

    def run(self, policy: AutoTrees, dispatches: int) -> None:
        for _ in range(dispatches):
            drafts, cycles = policy.next(CASE, [0], 8, self.ready)
            form = drafts if drafts > CHAIN else CHAIN
            steps = cycles if drafts else cycles * STEPS_PER_CYCLE
            spent = np.interp(drafts, (0, CHAIN), (1.0, self.seconds[CHAIN])) if drafts <= CHAIN else 0.0
            spent = float(spent or self.seconds[drafts]) * steps * float(np.exp(0.05 * self.rng.normal()))
            accepted = np.minimum(self.rng.geometric(1 - self.chance[form], steps) - 1, min(drafts, DEPTH)).tolist()
            policy.observe(CASE, drafts, steps, spent, {0: cycles_of(accepted, drafts)} if drafts else {})
            self.time, self.uses[drafts] = self.time + spent, self.uses[drafts] + 1
            self.tokens += steps + (sum(accepted) if drafts else 0)

    def best(self) -> float:
        """Tokens a second of the best form, of the whole chain, trees and plain steps."""
        rates = [1.0]
        for form, chance in self.chance.items():
            rates.append((1 - chance ** (DEPTH + 1)) / (1 - chance) / self.seconds[form])
        return max(rates)


@pytest.mark.parametrize(
    ("seconds", "chance", "wins"),
    [
        ({CHAIN: 1.2, TREE: 1.3, SMALL: 1.25}, (0.7, 0.8, 0.75), TREE),  # an accelerator
        ({CHAIN: 1.5, TREE: 4.0, SMALL: 2.6}, (0.75, 0.8, 0.77), CHAIN),  # a CPU
        ({CHAIN: 1.5, TREE: 3.0, SMALL: 1.6}, (0.6, 0.85, 0.84), SMALL),  # which has a cliff
        ({CHAIN: 2.5, TREE: 3.0, SMALL: 2.7}, (0.2, 0.3, 0.25), 0),
    ],
)
def test_it_takes_what_is_faster_and_loses_little_by_learning(seconds, chance, wins):
    policy, machine = AutoTrees(CHAIN, TREE), Machine(seconds, chance)
    machine.run(policy, 600)
    assert machine.uses.most_common(1)[0][0] == wins, machine.uses
    assert machine.tokens / machine.time > 0.93 * machine.best(), machine.uses
    what = {TREE: "trees of 20, ", SMALL: "trees of 10, ", CHAIN: "chains, "}
    assert str(policy).startswith(what[wins]) if wins else "plain steps" in str(policy)


def test_it_notices_that_a_form_has_become_faster():
    policy, machine = AutoTrees(CHAIN, TREE), Machine({CHAIN: 1.5, TREE: 2.4, SMALL: 2.0}, (0.75, 0.8, 0.77))
    machine.run(policy, 300)
    machine.seconds[TREE], machine.uses = 1.3, Counter()
    machine.run(policy, 2000)
    assert machine.uses.most_common(1)[0][0] == TREE


def test_forms_whose_programs_are_not_ready_are_not_taken():
    policy, machine = AutoTrees(CHAIN, TREE), Machine({CHAIN: 1.2, TREE: 2.5, SMALL: 2.0}, (0.8, 0.8, 0.8))
    machine.ready = lambda drafts: drafts == TREE
    machine.run(policy, 100)
    assert {*machine.uses} <= {0, TREE}
    machine.ready = lambda drafts: True
    machine.run(policy, 1500)
    assert machine.uses.most_common(1)[0][0] == CHAIN


def test_which_policy_a_drafter_has():
    config = factory.draft_config()  # five proposals
    found = auto_policy(DecodeConfig(factory.TARGET, TreeDrafter(config, nodes=12)))
    assert isinstance(found, AutoTrees) and [form.most for form in found._forms] == [5, 12, 6]
    found = auto_policy(DecodeConfig(factory.TARGET, TreeDrafter(config, nodes=4)))
    assert isinstance(found, AutoTrees) and [form.most for form in found._forms] == [3, 4]
    assert isinstance(auto_policy(DecodeConfig(factory.TARGET, TreeDrafter(config, nodes=1))), AutoDrafts)
    view = DualViewConfig(**factory.TARGET.geometry(), block_size=5, mask_token_id=88)
    found = auto_policy(DecodeConfig(factory.TARGET, DualViewTreeDrafter(view, nodes=12)))
    assert isinstance(found, AutoTrees) and [form.most for form in found._forms] == [4, 12, 6]


class InTurn(AutoDrafts):
    """Trees, chains of two sizes, and plain steps, one dispatch each."""

    def next(self, case: Any, rows: Any, longest: int, ready: Any = None) -> tuple[int, int]:
        self._tokens += 1
        return ((9, 1), (5, 1), (2, 1), (0, 1))[int(self._tokens) % 4]

    def observe(self, case: Any, drafts: int, cycles: int, seconds: float | None, told: Any) -> None:
        """Learn nothing."""


@pytest.mark.parametrize("view", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["block", "second view"])
def test_one_state_goes_on_with_trees_chains_and_plain_steps(view):
    """Greedy rows and coupled samples are the target's, whatever each dispatch was."""
    pair = factory.good_pair(factory.BYTE_TARGET, 3, num_hidden_layers=1)
    assert pair.configs.draft is not None
    trees, params = replace(pair.configs, drafter=TreeDrafter(pair.configs.draft, nodes=9)), pair.params
    if view:
        config = DualViewConfig(**pair.configs.target.geometry(), block_size=6, mask_token_id=88)
        trees = replace(trees, drafter=DualViewTreeDrafter(config, nodes=9))
        params = params._replace(draft=factory.random_weights(config, 1))

    def completions() -> list[Completion]:
        params = [SamplingParams(max_tokens=30), SamplingParams(0.8, max_tokens=24, seed=3)]
        return [Completion(Request([5 + i, 40, 7], p, (i,))) for i, p in enumerate(params)]

    expected, found, dtype = completions(), completions(), jnp.dtype("float32")
    list(Slots(pair.params.without_drafter, pair.configs.without_drafter, 2, dtype).run(expected))
    list(Slots(params, trees, 2, dtype, cycles=1, policy=InTurn(9, whole=True)).run(found))
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    assert {len(cycle.drafts) for c in found for cycle in c.cycles} >= {9, 5, 2} and all(c.steps for c in found)
