"""Prioritised replay against sums, frequencies and weights worked out another way."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from graphprune.agents.replay import ALPHA, EPSILON, PrioritisedReplay, SumTree, importance

SPACE = spaces.Dict({"x": spaces.Box(-1e3, 1e3, (2,), np.float32)})


def memory(size: int = 8, environments: int = 2) -> PrioritisedReplay:
    """An empty memory of transitions between pairs of numbers."""
    return PrioritisedReplay(size, SPACE, spaces.Discrete(5), "cpu", n_envs=environments, rng=np.random.default_rng(0))


def fill(made: PrioritisedReplay, steps: int, environments: int = 2) -> None:
    """Transition `step * environments + environment` is told from the others by each of its parts."""
    for step in range(steps):
        number = step * environments + np.arange(environments, dtype=np.float32)
        pair = np.stack([number, number], axis=1)
        done = number % 2 == 1
        made.add({"x": pair}, {"x": pair + 0.5}, (number % 5).astype(np.int64), 10 * number, done, [{}] * environments)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
def test_sum_tree_agrees_with_running_sums(size: int) -> None:
    rng = np.random.default_rng(size)
    tree, priorities = SumTree(size), np.zeros(size)
    for _ in range(20):
        changed = rng.choice(size, size=rng.integers(1, size + 1), replace=False)
        priorities[changed] = rng.integers(0, 4, len(changed)).astype(float)  # whole numbers add up exactly
        tree[changed] = priorities[changed]
        assert tree.total == priorities.sum()
        assert (tree[np.arange(size)] == priorities).all()
        masses = np.arange(2 * priorities.sum()) / 2
        if len(masses):
            assert (tree.find(masses) == np.searchsorted(np.cumsum(priorities), masses, side="right")).all()


def test_a_mass_that_rounding_carries_too_far_ends_at_the_last_priority() -> None:
    tree = SumTree(4)
    tree[np.arange(3)] = np.array([0.1, 0.2, 0.3])
    assert tree.find(np.array([tree.total])).tolist() == [2]


def test_one_index_set_twice_at_once_keeps_the_sums_right() -> None:
    tree = SumTree(4)
    tree[np.array([1, 1, 2])] = np.array([3.0, 5.0, 1.0])
    assert tree.total == 6.0
    assert tree.find(np.array([4.9, 5.0])).tolist() == [1, 2]


def test_transitions_are_drawn_as_often_as_their_error_to_the_alpha() -> None:
    made = memory()
    fill(made, 4)
    errors = np.array([0.0, 0.1, -0.2, 0.5, 1.0, -2.0, 4.0, 8.0])
    made.reprioritise(np.arange(8), errors)
    counts = np.bincount(made.draw(40_000, 1.0).indices, minlength=8)
    expected = (np.abs(errors) + EPSILON) ** ALPHA
    assert counts / 40_000 == pytest.approx(expected / expected.sum(), abs=2e-3)


def test_draws_are_stratified() -> None:
    """One draw from each of k equal ranges: with equal priorities and k a multiple of N, all come up equally often."""
    made = memory()
    fill(made, 4)
    assert np.bincount(made.draw(24, 1.0).indices).tolist() == [3] * 8


def test_importance_weights_in_closed_form() -> None:
    probabilities = np.array([0.5, 0.25, 0.125])
    assert importance(probabilities, 4, 0.0) == pytest.approx([1, 1, 1])
    assert importance(probabilities, 4, 1.0) == pytest.approx([0.25, 0.5, 1])
    assert importance(probabilities, 4, 0.5) == pytest.approx([0.5, 0.5**0.5, 1])


def test_weights_undo_the_bias_of_the_draw() -> None:
    """With beta 1 the weighted mean over draws estimates the plain mean over all transitions."""
    made = memory()
    fill(made, 4)
    made.reprioritise(np.arange(8), np.array([0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 9.0]))
    drawn = made.draw(40_000, 1.0)
    weights = drawn.weights.numpy()[:, 0]
    rewards = drawn.rewards.numpy()[:, 0]
    assert (weights * rewards).sum() / weights.sum() == pytest.approx(35.0, rel=0.01)
    assert abs(rewards.mean() - 35.0) > 2


def test_what_is_drawn_belongs_together_also_after_the_oldest_made_room() -> None:
    made = memory()
    fill(made, 7)  # of 4 steps only the last 4 stay
    drawn = made.draw(64, 0.5)
    number = drawn.observations["x"][:, 0]
    assert set(number.int().tolist()) == set(range(6, 14))
    assert torch.equal(drawn.observations["x"][:, 1], number)
    assert torch.equal(drawn.next_observations["x"][:, 0], number + 0.5)
    assert torch.equal(drawn.actions[:, 0].float(), number % 5)
    assert torch.equal(drawn.rewards[:, 0], 10 * number)
    assert torch.equal(drawn.dones[:, 0], number % 2)
    assert torch.equal(number, torch.from_numpy(drawn.indices).float() + torch.where(number >= 8, 8, 0))


def test_a_new_transition_gets_the_largest_priority_so_far() -> None:
    made = memory(16)
    fill(made, 1)
    assert (made.priorities[np.arange(2)] == 1).all()
    made.reprioritise(np.array([0]), np.array([50.0]))
    made.reprioritise(np.array([0]), np.array([0.1]))
    fill(made, 1)
    assert made.priorities[np.arange(2, 4)] == pytest.approx((50 + EPSILON) ** ALPHA)


def test_nothing_is_drawn_that_was_forgotten() -> None:
    made = memory()
    fill(made, 4)
    made.reset()
    fill(made, 1)
    assert set(made.draw(50, 1.0).indices.tolist()) == {0, 1}
