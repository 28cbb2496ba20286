"""Many episodes of one problem in lock-step, for Stable-Baselines3: every environment is at the same site."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from graphprune.environment import Observation, Observer

Judge = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Rewards [N] of finished choice vectors [N, sites]."""


class Episodes(VecEnv):  # type: ignore[misc]
    """The vectorised form of `graphprune.environment.PruningEnv`: same observations, masks and episode ends.

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

    def has_attr(self, attr_name: str) -> bool:
        """Whether the environments have an attribute; sb3-contrib asks for `action_masks`."""
        return hasattr(self, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute, once per environment; Stable-Baselines3 asks for the render mode, and there is none."""
        value = None if attr_name == "render_mode" else getattr(self, attr_name)
        return [value] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not offered: the environments are one object."""
        raise NotImplementedError(attr_name)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> Sequence[Any]:
        """Call a method that answers for all environments at once."""
        answers: Sequence[Any] = getattr(self, method_name)(*method_args, **method_kwargs)
        return answers

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """No environment is wrapped."""
        return [False] * self.num_envs

    def close(self) -> None:
        """Nothing is held open."""
