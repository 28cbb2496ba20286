"""Many episodes of one problem in lock-step, for Stable-Baselines3: every environment is at the same site."""

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from graphprune.agents.lockstep import LockStep
from graphprune.searching.environment import Observation, Observer

Judge = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Rewards [N] of finished choice vectors [N, sites]."""


class Episodes(LockStep):
    """The vectorised form of `graphprune.searching.environment.PruningEnv`: same observations, masks and episode ends.

    What a finished plan is worth is left to `judge`, so that most episodes can be imagined and few are evaluated.
    """

    def __init__(self, observer: Observer, count: int, judge: Judge) -> None:
        super().__init__(count, observer.space, spaces.Discrete(observer.options))
        self.observer = observer
        self.judge = judge
        self.finished = self._prefixes = self._actions = np.zeros((count, 0), dtype=np.int64)

    def reset(self) -> Observation:
        """Start all episodes."""
        self._prefixes = np.zeros((self.num_envs, 0), dtype=np.int64)
        return self.observer(self._prefixes)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Keep the actions [N] for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], list[dict[str, Any]]]:
        """Take the actions. All episodes end together, are judged together, and start again."""
        self._prefixes = np.concatenate([self._prefixes, self._actions.reshape(-1, 1)], axis=1)
        done = self._prefixes.shape[1] == self.observer.sites
        rewards = np.zeros(self.num_envs)
        if done:
            self.finished = self._prefixes
            rewards = self.judge(self.finished)
            self._prefixes = np.zeros((self.num_envs, 0), dtype=np.int64)
        return self.observer(self._prefixes), rewards, np.full(self.num_envs, done), [{} for _ in range(self.num_envs)]

    def action_masks(self) -> NDArray[np.bool_]:
        """The action wall of every episode: [N, options]."""
        return self.observer.masks(self._prefixes)
