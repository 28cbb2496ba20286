"""Prioritised experience replay: transitions are drawn in proportion to how much they surprised.

Schaul, Quan, Antonoglou, Silver, ICLR 2016 (arXiv 1511.05952), the proportional variant of section 3.3: P(i) is
p_i^alpha / sum p_k^alpha with p_i = |TD error| + epsilon, drawn from a sum tree, one draw from each of k equal ranges;
the bias is undone by the weights (N P(i))^-beta, divided by their largest.
"""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictReplayBuffer
from torch import Tensor

from graphprune.searching.problem import Floats

ALPHA = 0.6
"""How much priorities count: 0 draws uniformly. The paper's value for the proportional variant."""
EPSILON = 1e-3
"""Keeps transitions without any error in the draw."""
Indices = NDArray[np.int64]


class SumTree:
    """Non-negative priorities whose running sums are found in logarithmic time.

    A full binary tree in one array: node n has the children 2n and 2n + 1, each node holds the sum of its children, and
    the priorities are the last level.
    """

    def __init__(self, size: int) -> None:
        self._first = 1 << max(size - 1, 0).bit_length()
        self._nodes = np.zeros(2 * self._first)

    @property
    def total(self) -> float:
        """The sum of all priorities."""
        return float(self._nodes[1])

    def __getitem__(self, indices: Indices) -> Floats:
        return self._nodes[self._first + indices]

    def __setitem__(self, indices: Indices, priorities: Floats) -> None:
        nodes = self._first + indices
        self._nodes[nodes] = priorities
        while nodes[0] > 1:
            nodes = np.unique(nodes // 2)
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def find(self, masses: Floats) -> Indices:
        """The index i of each mass [K] in [0, total) with sum(p[:i]) <= mass < sum(p[:i + 1]): [K]."""
        nodes, masses = np.ones(len(masses), dtype=np.int64), masses.copy()
        while nodes[0] < self._first:
            left = self._nodes[2 * nodes]
            right = (masses >= left) & (
                self._nodes[2 * nodes + 1] > 0
            )  # a rounded mass must not end at a priority of 0
            masses -= np.where(right, left, 0.0)
            nodes = 2 * nodes + right
        return nodes - self._first


def importance(probabilities: Floats, size: int, beta: float) -> Floats:
    """Weights [K] of transitions drawn with some probabilities [K] out of `size`, the largest being 1."""
    weights = (size * probabilities) ** -beta
    return np.asarray(weights / weights.max(), dtype=np.float64)


class Draw(NamedTuple):
    """K transitions: what Stable-Baselines3 holds of each, its weight [K, 1] and its place in the memory [K]."""

    observations: dict[str, Tensor]
    actions: Tensor
    next_observations: dict[str, Tensor]
    dones: Tensor
    rewards: Tensor
    weights: Tensor
    indices: Indices


class PrioritisedReplay(DictReplayBuffer):  # type: ignore[misc]
    """Stable-Baselines3's memory of transitions between dictionaries of arrays, drawn by priority.

    Transition `step * environments + environment` has one priority. A new one gets the largest so far, so that each is
    seen soon.
    """

    def __init__(
        self, buffer_size: int, observation_space: spaces.Dict, *args: Any, rng: np.random.Generator, **kwargs: Any
    ) -> None:
        super().__init__(buffer_size, observation_space, *args, **kwargs)
        self._rng = rng
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.priorities = SumTree(self.buffer_size * self.n_envs)
        self._largest = 1.0

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Keep one transition of each environment; the oldest ones make room."""
        places = self.pos * self.n_envs + np.arange(self.n_envs)
        super().add(*args, **kwargs)
        self.priorities[places] = np.full(self.n_envs, self._largest)

    def draw(self, count: int, beta: float) -> Draw:
        """Draw transitions by priority, with repetition; `beta` is how far the bias is undone, 1 being wholly."""
        total = self.priorities.total
        indices = self.priorities.find((np.arange(count) + self._rng.random(count)) * (total / count))
        weights = importance(self.priorities[indices] / total, self.size() * self.n_envs, beta)
        step, env = np.divmod(indices, self.n_envs)
        return Draw(
            {name: self.to_torch(values[step, env]) for name, values in self.observations.items()},
            self.to_torch(self.actions[step, env]),
            {name: self.to_torch(values[step, env]) for name, values in self.next_observations.items()},
            self.to_torch(self.dones[step, env].reshape(-1, 1)),
            self.to_torch(self.rewards[step, env].reshape(-1, 1)),
            self.to_torch(weights.astype(np.float32).reshape(-1, 1)),
            indices,
        )

    def reprioritise(self, indices: Indices, errors: Floats) -> None:
        """Set the priorities of drawn transitions [K] from their new TD errors [K]."""
        priorities = (np.abs(errors) + EPSILON) ** ALPHA
        self.priorities[indices] = priorities
        self._largest = max(self._largest, float(priorities.max()))
