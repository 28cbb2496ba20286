"""GNN-RL: one ratio for every site at once, read from a two-level graph that shrinks step by step, learnt by PPO.

Yu, Mazaheri, Jannesari, ICML 2022, arXiv 2102.03214. From the paper: motifs of units are embedded first and describe
the edges of the layer graph; PPO draws all ratios at once from a normal distribution with a diagonal covariance; the
shares that stay are multiplied by (1 - ratio), so that each of at most five steps shrinks the graph further; the
episode ends when the budget is met; its reward is minus the error, and minus the largest error (the paper's -100, in
per cent) when the budget is missed. Layers that are coupled share a ratio: here they are one site.

Ours:

- A ratio is a share of what the site can save (`Fronts`), so that every pattern counts, not channels alone.
- The budget is the problem's target, whatever it is made of. Whether an episode meets it is asked of the options
  nearest to the ratios, before the action wall: there -1 teaches, and a missed episode spends no trial. What is
  evaluated then is the plan that the wall leaves of them, nearly always the same, and always legal.
- The step that meets the budget is cut short where it does: a whole step would often save more than was asked for.
- Options that exclude each other: the earlier site has precedence.
- Error and cost tables stand beside the motifs, GINE layers take the place of the paper's own, one head that all
  sites share takes the place of one output per layer, and the deviation is learnt.
- Only plans that are new are evaluated; others are rewarded as they were. Nothing is imagined.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from graphprune.agents.fronts import Fronts
from graphprune.agents.motifs import STATE_FEATURES, RatioPolicy
from graphprune.agents.policies import Learner, Weights, adopt, reproducible, weights_of
from graphprune.agents.wall import only_plan
from graphprune.randomness import seeded
from graphprune.record import Record
from graphprune.searching.environment import BOUND, Observation
from graphprune.searching.problem import ROUNDING, Choices, Floats, Problem

STEPS = 5
"""Most steps of an episode."""
MISSED = -1.0
"""The reward of an episode that misses the budget, and of a plan that fails: that of an accuracy of 0."""
CUTS = 8
"""A step may be cut short at this many places, evenly spaced."""
EPISODES = 4
"""Episodes that run side by side; a PPO update follows on every `STEPS` steps of each."""
START = (0.3, 0.5)
"""Mean and standard deviation of all ratios before anything is learnt."""
IDLE = 100
"""The search ends after this many episodes in a row without a new plan."""
Judge = Callable[[Choices | None], float]
"""The reward of an episode that ends with a plan; None: it misses the budget."""


def reward(record: Record) -> float:
    """Minus the error, the share of wrong answers."""
    return MISSED if record.error is not None or record.accuracy is None else record.accuracy - 1.0


@contextmanager
def interlude(threads: int) -> Iterator[None]:
    """What an evaluation needs amid `reproducible`: the caller's threads; and what it draws leaves no trace."""
    inner = torch.get_num_threads()
    with seeded(0):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(inner)


class ShrinkingEnv(gymnasium.Env[Observation, NDArray[np.float32]]):  # type: ignore[misc]
    """All sites of a problem are cut a little more in each step; version 1.

    ## Description
    At each site stands a share of what it can save that is not saved yet. A step takes a ratio off each of them.

    ## Action Space
    `Box(0, 1, [sites])`: the ratio by which each site's share is cut.

    ## Observation Space
    A `Dict`: `asked` [sites] are the options nearest to the shares, `kept` [sites] the shares, `state` [2] the overrun
    of the budget and the share of the steps that are done. The graph belongs to the policy, which knows the problem.

    ## Rewards
    0 until the end, then what `judge` says of the plan, or of None if the budget is missed. Not to be discounted.

    ## Starting State
    All shares are 1: the dense model. The environment draws no random numbers.

    ## Episode End
    *Terminated*: the budget is met, or `STEPS` steps are done. Never truncated.

    ## Arguments
    `fronts`: the fronts of the problem to solve. `judge`: see `Judge`.

    ## Version History
    1: first version.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(self, fronts: Fronts, judge: Judge) -> None:
        self.problem: Problem = fronts.problem
        self.fronts = fronts
        self.judge = judge
        sites = (len(self.problem.decisions),)
        widest = max(len(decision.options) for decision in self.problem.decisions)
        self.observation_space = spaces.Dict(
            {
                "asked": spaces.Box(0, widest - 1, sites, np.int64),
                "kept": spaces.Box(0, 1, sites, np.float32),
                "state": spaces.Box(0, BOUND, (STATE_FEATURES,), np.float32),
            }
        )
        self.action_space = spaces.Box(0, 1, sites, np.float32)
        factors = (factor for name in self.problem.limits for factor in self.problem.costs[name].factors)
        self._exclusive = {site for factor in factors if np.isinf(factor.table).any() for site in factor.sites}
        self._start()

    def _start(self) -> None:
        self.kept: Floats = np.ones(len(self.problem.decisions))
        self.asked: NDArray[np.int64] = np.array(self.problem.dense, dtype=np.int64)
        self.steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode: nothing is cut."""
        super().reset(seed=seed)
        self._start()
        return self._observation(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Cut all sites by their ratios, or by as much of them as meets the budget."""
        parts = np.linspace(1 / CUTS, 1, CUTS)[:, None]
        shares = self.kept * (1 - parts * np.asarray(action, dtype=np.float64))
        asked = self.asks(shares)
        met = self.problem.overruns(asked) <= 1 + ROUNDING
        taken = int(met.argmax()) if met.any() else CUTS - 1
        self.kept, self.asked = shares[taken], asked[taken]
        self.steps += 1
        if not met[taken] and self.steps < STEPS:
            return self._observation(), 0.0, False, False, {}
        plan = self.fronts.plan((1 - self.kept).tolist()) if met[taken] else None
        return self._observation(), self.judge(plan), True, False, {}

    def asks(self, kept: Floats) -> NDArray[np.int64]:
        """The options nearest to the shares [N, sites], before the action wall: [N, sites]."""
        choices = np.tile(np.array(self.problem.dense, dtype=np.int64), (len(kept), 1))
        for site, decision in enumerate(self.problem.decisions):
            legal = np.ones((len(kept), len(decision.options)), dtype=np.bool_)
            if site in self._exclusive:
                legal = np.isfinite(self.problem.sweep_overruns(choices, site))
            pairs = zip(kept[:, site], legal, strict=True)
            choices[:, site] = [self.fronts.nearest(site, 1 - share, row) for share, row in pairs]
        return self.problem.canonicals(choices)

    def _observation(self) -> Observation:
        state = [min(self.problem.overrun(self.asked.tolist()), BOUND), self.steps / STEPS]
        return {
            "asked": self.asked.copy(),
            "kept": self.kept.astype(np.float32),
            "state": np.array(state, dtype=np.float32),
        }


class GNNRL(Learner):
    """The agent."""

    name = "gnn_rl"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search until the trials are spent or no new plan turns up."""
        if (plan := only_plan(problem)) is not None:
            problem.evaluate(plan)
            return
        search = Search(problem, rng, self._weights)
        try:
            search.spend()
        finally:
            self._weights = search.weights()


class Search:
    """One run: a policy, and the rewards of the plans it has tried."""

    def __init__(self, problem: Problem, rng: np.random.Generator, weights: Weights | None) -> None:
        self.problem = problem
        self.rng = rng
        self.fronts = Fronts(problem)
        self.rewards: dict[Choices, float] = {}
        self.idle = 0
        self._threads = torch.get_num_threads()
        with reproducible(rng):
            self.ppo = PPO(
                RatioPolicy,
                DummyVecEnv([lambda: ShrinkingEnv(self.fronts, self.judge)] * EPISODES),
                learning_rate=3e-3,
                n_steps=STEPS,
                batch_size=STEPS * EPISODES,
                n_epochs=10,
                gamma=1.0,
                gae_lambda=1.0,
                clip_range=0.2,
                policy_kwargs={"problem": problem, "start": START[0], "log_std_init": float(np.log(START[1]))},
                device="cpu",
            )
            self.ppo.set_logger(Logger(None, []))
            if weights is not None:
                adopt(self.ppo.policy, weights)

    def weights(self) -> Weights:
        """The policy's parameters, which do not depend on the problem's size."""
        return weights_of(self.ppo.policy)

    def judge(self, plan: Choices | None) -> float:
        """The reward of an episode's plan, which is evaluated if it is new."""
        self.idle += 1
        if plan is None:
            return MISSED
        if plan not in self.rewards:
            self.idle = 0
            with interlude(self._threads):
                self.rewards[plan] = reward(self.problem.evaluate(plan))
        return self.rewards[plan]

    def spend(self) -> None:
        """Let episodes and updates alternate until no trial is left (BudgetSpent) or no new plan turns up.

        If no episode ever met the budget, the plan that asks for the most at each site is evaluated at least.
        """
        while self.idle < IDLE:
            with reproducible(self.rng):
                self.ppo.learn(STEPS * EPISODES, log_interval=None, reset_num_timesteps=False)
        if not self.problem.records:
            self.problem.evaluate(self.fronts.plan([1.0] * len(self.problem.decisions)))
