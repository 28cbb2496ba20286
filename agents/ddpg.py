"""DDPG for episodes of ratios: Stable-Baselines3's, fed by hand.

Lillicrap et al. 2016 (arXiv 1509.02971), used as He et al. 2018 (AMC, arXiv 1802.03494) do: the reward of a finished
episode is given to each of its steps, less a moving average of the rewards so far, and gamma is 1. Ours: rewards are
divided by their deviation and by the number of sites, so that Q stays of order 1 whatever the model.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import update_learning_rate
from torch.optim import Optimizer

from graphprune.agents.bounded import BoundedPolicy
from graphprune.agents.policies import Weights, reproducible, weights_of
from graphprune.agents.ratios import Embeddings, RatioEpisodes
from graphprune.searching.problem import Floats

BATCH = 128
RATES = (1e-3, 3e-3)
"""Learning rates of actor and critic."""
TAU = 0.01
"""How fast the target networks follow."""
BASELINE = 0.1
"""The share of the newest reward in the moving average."""
WIDTHS = (64, 64)
MEMORY = 20_000
"""Steps that the memory holds."""


def truncated_normal(mean: Floats, deviation: float, rng: np.random.Generator) -> Floats:
    """Numbers from normal distributions around `mean` [N], cut off outside [0, 1]; uniform for infinite deviation."""
    if deviation == inf:
        return rng.random(len(mean))
    low, high = ndtr(-mean / deviation), ndtr((1 - mean) / deviation)
    drawn = mean + deviation * ndtri(low + (high - low) * rng.random(len(mean)))
    return np.asarray(drawn.clip(0, 1), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Episode:
    """Embeddings [sites, D], executed actions [sites], and the reward that each step is given."""

    observations: Embeddings
    actions: Floats
    value: float


class BaselinedReplay(ReplayBuffer):  # type: ignore[misc]
    """Stable-Baselines3's memory; what is drawn from it are rewards less a baseline, in units of `scale`."""

    baseline = 0.0
    scale = 1.0

    def centre(self, values: Floats, sites: int) -> None:
        """See rewards as what they are beyond the moving average of `values` [N], in N's deviation times the sites."""
        self.baseline = moving_average(values)
        self.scale = max(float(values.std()), 1e-3) * sites

    def _get_samples(self, *args: Any, **kwargs: Any) -> ReplayBufferSamples:
        samples = super()._get_samples(*args, **kwargs)
        return samples._replace(rewards=(samples.rewards - self.baseline) / self.scale)


def moving_average(values: Floats) -> float:
    """The exponential moving average of values in the order in which they came."""
    average = float(values[0])
    for value in values[1:].tolist():
        average += BASELINE * (value - average)
    return average


class SlowActor(DDPG):  # type: ignore[misc]
    """Stable-Baselines3's DDPG with a learning rate for the actor and another for the critic."""

    def _update_learning_rate(self, optimizers: list[Optimizer]) -> None:
        for optimizer, rate in zip(optimizers, RATES, strict=True):
            update_learning_rate(optimizer, rate)


class RatioPolicy:
    """DDPG that is fed by hand: what a step was worth is known only when its episode was judged."""

    def __init__(self, episodes: RatioEpisodes, rng: np.random.Generator) -> None:
        self.rng = rng
        self.episodes = episodes
        self.replay = BaselinedReplay(MEMORY, episodes.observation_space, episodes.action_space, "cpu")
        self.restart()

    def restart(self) -> None:
        """Fresh weights; the memory stays."""
        with reproducible(self.rng):
            self.ddpg = SlowActor(
                BoundedPolicy,
                self.episodes,
                buffer_size=1,
                tau=TAU,
                gamma=1.0,
                policy_kwargs={"net_arch": list(WIDTHS)},
                device="cpu",
            )
        self.ddpg.set_logger(Logger(None, []))
        self.ddpg.replay_buffer = self.replay

    def answers(self, observations: Embeddings, noise: float) -> Floats:
        """The actor's answers to embeddings [N, D], with noise: [N]."""
        asked, _ = self.ddpg.predict(observations, deterministic=True)
        return truncated_normal(asked[:, 0].astype(np.float64), noise, self.rng)

    def remember(self, episode: Episode) -> None:
        """Keep one episode in the memory."""
        actions = self.ddpg.policy.scale_action(episode.actions[:, None])
        seen, value = episode.observations, np.array(episode.value)
        after = np.concatenate([seen[1:], seen[-1:]])
        for site, action in enumerate(actions):
            self.replay.add(seen[site], after[site], action, value, np.array(site == len(actions) - 1), [{}])

    def train(self, updates: int) -> None:
        """Take gradient steps."""
        with reproducible(self.rng):
            self.ddpg.train(updates, BATCH)

    def weights(self) -> Weights:
        """The parameters, which do not depend on the problem's size."""
        return weights_of(self.ddpg.policy)
