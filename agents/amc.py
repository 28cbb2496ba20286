"""AMC: deep deterministic policy gradients choose a ratio for each site, in order, and the wall keeps the budget.

He et al. 2018, ECCV, arXiv 1802.03494. From the paper: DDPG over an embedding of the layer that is next, one ratio per
layer, bounded so that the budget stays in reach, the executed ratio in the replay memory; the reward of the finished
plan is given to each of its steps, less a moving average of the rewards so far, and gamma is 1; random ratios first,
then truncated normal noise around the actor's answer that decays exponentially. Ours: a ratio picks the nearest option
of a site's (cost, error) front, rewards are divided by their deviation and by the number of sites, so that Q stays of
order 1 whatever the model, and what is drawn is drawn anew, with more noise, where it was evaluated before.

`History` adds what Mu et al. 2021 (arXiv 2107.08815) take from earlier runs: see `graphprune.agents.history`.
"""

from collections.abc import Iterator
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

from graphprune.agents.autosculpt import only_plan, promise, reproducible
from graphprune.agents.belief import Belief
from graphprune.agents.bounded import BoundedPolicy
from graphprune.agents.history import PROBATION, others, practise, replay, worse
from graphprune.agents.policies import Learner, Weights, adopt, weights_of
from graphprune.agents.ratios import Embeddings, RatioEpisodes, Vectors, walk
from graphprune.environment import reward
from graphprune.past import History, read_past
from graphprune.problem import Choices, Floats, Problem

DRAWS = 16
"""Plans that the policy draws for one trial."""
WARM_UP = 0.2
"""The share of the trials that is spent on random ratios."""
NOISE = (0.5, 0.15, 0.05)
"""Deviations of the noise: after the warm-up (AMC's), of a policy that was taught before, and at the last trial."""
WIDENINGS = 5
"""How often the noise is doubled, before it is uniform, where every plan drawn was evaluated before."""
UPDATES = 8
"""Gradient steps for each trial."""
BATCH = 128
RATES = (1e-3, 3e-3)
"""Learning rates of actor and critic: an actor as fast is at the ends of its range before the critic knows much."""
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


class BaselinedReplay(ReplayBuffer):  # type: ignore[misc]
    """Stable-Baselines3's memory; what is drawn from it are rewards less a baseline, in units of `scale`."""

    baseline = 0.0
    scale = 1.0

    def _get_samples(self, *args: Any, **kwargs: Any) -> ReplayBufferSamples:
        samples = super()._get_samples(*args, **kwargs)
        return samples._replace(rewards=(samples.rewards - self.baseline) / self.scale)


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

    def remember(self, observations: Embeddings, executed: Floats, value: float) -> None:
        """Keep one episode: embeddings [sites, D], executed actions [sites], and the reward that each step is given."""
        actions = self.ddpg.policy.scale_action(executed[:, None])
        after = np.concatenate([observations[1:], observations[-1:]])
        last = len(executed) - 1
        for site, action in enumerate(actions):
            self.replay.add(observations[site], after[site], action, np.array(value), np.array(site == last), [{}])

    def train(self, updates: int) -> None:
        """Take gradient steps."""
        with reproducible(self.rng):
            self.ddpg.train(updates, BATCH)

    def weights(self) -> Weights:
        """The parameters, which do not depend on the problem's size."""
        return weights_of(self.ddpg.policy)


class Amc(Learner):
    """Ratios by DDPG; `history` says what it takes from earlier searches, which are read at once.

    `load_policy` before `run` starts from the weights of an earlier run, on any model. Raises InputError if the study
    of earlier searches cannot be used.
    """

    name = "amc"

    def __init__(self, history: History = History()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.history = history
        self._pasts = () if history.study is None else read_past(history.study)

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search until the trials are spent or no new plan turns up."""
        if (plan := only_plan(problem)) is not None:
            problem.evaluate(plan)
            return
        search = Search(problem, rng, Belief(problem) if self.history.assistant else None)
        try:
            search.spend(self._taught(search.policy, problem, rng))
        finally:
            self._weights = search.policy.weights()

    def _taught(self, policy: RatioPolicy, problem: Problem, rng: np.random.Generator) -> bool:
        """Teach a policy all that is known before the first trial; whether that is anything."""
        if self._weights is not None:
            adopt(policy.ddpg.policy, self._weights)
        if self._pasts:
            pasts = others(self._pasts, problem)
            if self.history.augment:
                practise(policy, pasts, rng)
            if self.history.transfer:
                replay(policy, pasts)
        return self._weights is not None or bool(self._pasts)


class Search:
    """One run: a policy, perhaps an assistant, and what the plans tried so far were worth."""

    def __init__(self, problem: Problem, rng: np.random.Generator, assistant: Belief | None = None) -> None:
        self.problem = problem
        self.assistant = assistant
        self.rewards: dict[Choices, float] = {}
        self.episodes = RatioEpisodes(problem, DRAWS, self.judge)
        self.policy = RatioPolicy(self.episodes, rng)
        self.fell_back = False

    def judge(self, plans: Vectors) -> Floats:
        """What drawn plans [N, sites] promise, by the assistant; without one they are all alike."""
        return np.zeros(len(plans)) if self.assistant is None else promise(self.assistant, plans)

    def spend(self, taught: bool = False) -> None:
        """Spend the trials, until none is left or no new plan turns up; a taught policy begins on probation."""
        for noise in self._noises(taught):
            if not self.problem.remaining or not self._try(noise):
                return

    def _noises(self, taught: bool) -> Iterator[float]:
        """The noise of one trial after another; between trials the policy learns, or starts afresh."""
        if taught:
            yield from [NOISE[1], inf] * int(np.clip(self.problem.trials // 5, 3, PROBATION))
            values = list(self.rewards.values())
            self.fell_back = worse(values[::2], values[1::2])
        if not taught or self.fell_back:
            while len(self.rewards) < WARM_UP * self.problem.trials:
                yield inf
            self.policy.restart()
            self.policy.train(UPDATES * len(self.rewards))
        first, left = NOISE[int(taught and not self.fell_back)], self.problem.remaining
        for step in range(left):
            yield first * (NOISE[2] / first) ** (step / left)
            self.policy.train(UPDATES)

    def _try(self, noise: float) -> bool:
        """Evaluate the most promising new plan that the policy draws; whether there is one."""
        for spread in [*(noise * 2**widening for widening in range(WIDENINGS)), inf]:
            drawn = walk(self.episodes, lambda seen, spread=spread: self.policy.answers(seen, spread))  # type: ignore[misc]
            plans = list(map(tuple, drawn.plans.tolist()))
            fresh = [row for row, plan in enumerate(plans) if plan not in self.rewards]
            if fresh:
                row = max(fresh, key=lambda row: drawn.worth[row])
                value = reward(self.problem, self.problem.evaluate(plans[row]), plans[row])
                self._learn(plans[row], value)
                self.policy.remember(drawn.observations[row], drawn.actions[row], value)
                return True
        return False

    def _learn(self, plan: Choices, value: float) -> None:
        """Note what a plan was worth, and how rewards are to be seen from now on."""
        replay, before = self.policy.replay, self.policy.replay.baseline if self.rewards else value
        self.rewards[plan] = value
        replay.baseline = before + BASELINE * (value - before)
        replay.scale = max(float(np.std(list(self.rewards.values()))), 1e-3) * len(plan)
        if self.assistant is not None:
            self.assistant.learn(np.array([plan]), np.array([value]))
