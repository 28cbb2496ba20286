"""Resource-aware pruning: keep or cut every unit, under a budget that is a constraint, against one's own best.

Balemans, Huybrechts, Steckel, Mercelis 2025, arXiv 2509.10526. The paper's, as its abstract has it: a graph attention
network over layers and channels, one binary decision per channel instead of a ratio per layer, a constrained Markov
decision process whose constraint is the budget, and a reward for outperforming the best result so far. The rest is our
reading:

- Layers and units are one graph (`graphprune.agents.units`), encoded by GATv2; a unit's logit is a score of its
  embedding, so one policy serves any model. All units are decided at once, in episodes of one step, and PPO learns.
- The constraint is met by the Lagrangian method: PPO maximises reward - multiplier x overrun, and the multiplier
  follows the mean overrun of what was *asked* (dual ascent): it rises while the budget is missed and falls, to zero at
  most, while it is met. What is evaluated is the legal plan nearest to what was asked, so that no trial is wasted.
- Overruns are known without a trial. So the policy first learns to meet the budget alone, and what it asks for later
  teaches about the budget even where it is not evaluated. Only evaluated plans have a reward.
- Self-competition: a new best feasible result wins 1; other results lose by how far they are behind the best, up to 1.
"""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from graphprune.agents.encoder import WIDTH, GraphEncoder, Split, typed_edges
from graphprune.agents.policies import Learner, Weights, adopt, reproducible, weights_of
from graphprune.agents.units import Bits, Units, Vectors, merged
from graphprune.agents.wall import only_plan
from graphprune.record import Record
from graphprune.searching.problem import Choices, Floats, Problem

EPISODES = 32
"""What the policy asks for in a round: episodes of one step each."""
ROUNDS = 40
"""The trials are spent in about this many rounds, one PPO update each."""
WARM_UP = 60
"""At most so many rounds, in which only the constraint counts, come before the first trial."""
STALLS = 5
"""The search ends after this many rounds in a row without a new plan."""
STEP = 4.0
"""How much the multiplier rises for a mean overrun of one whole budget."""
MOST = 1.0
"""The largest multiplier: what it has gathered while the policy came down must be undone once the budget is met."""
KEEP = 2.0
"""The logit with which every unit starts: the policy keeps most of them until the constraint presses."""
STATE = 2
"""Columns of an observation: how far the dense model is over the budget, and how heavily the constraint weighs."""


def dual_ascent(multiplier: float, overruns: Floats) -> float:
    """The next multiplier: one step along the gradient mean(overrun - 1) of the dual, within [0, MOST].

    `overruns` [N] are costs / limits of what was asked, 1 where the budget is just met.
    """
    return float(np.clip(multiplier + STEP * np.mean(overruns - 1), 0.0, MOST))


def self_competition(record: Record, best: float | None, span: float) -> float:
    """1 for a feasible accuracy above the own best so far, otherwise -(best - accuracy) / span, at least -1.

    A failure and what proved not to be feasible lose by 1; the very first result has nobody to beat and wins. `span` is
    how far the own results lie apart.
    """
    if record.accuracy is None or record.error is not None or not record.feasible:
        return -1.0
    if best is None or record.accuracy > best:
        return 1.0
    return max(-1.0, (record.accuracy - best) / max(span, 1e-9))


def lagrangian(rewards: Floats, overruns: Floats, multiplier: float) -> Floats:
    """What PPO maximises, [N]: (reward - multiplier x overrun) / (1 + multiplier), both standardised over the round.

    So the multiplier weighs alike in small and in large models. Rewards are NaN where nothing was evaluated: those
    count as average. The denominator keeps the sum bounded as the multiplier rises.
    """
    known = ~np.isnan(rewards)
    gains = np.zeros(len(rewards))
    gains[known] = standardised(rewards[known])
    signal: Floats = (gains - multiplier * standardised(overruns)) / (1 + multiplier)
    return signal


def standardised(values: Floats) -> Floats:
    """Values [N] with mean 0 and deviation 1; zeros where all are equal, or none is there."""
    if not len(values):
        return values
    standard: Floats = (values - values.mean()) / (values.std() + 1e-9)
    return standard


class ManyCoins(BernoulliDistribution):  # type: ignore[misc]
    """One coin per unit, with log probabilities divided by the root of the number of units.

    A sum of many small changes makes PPO's ratio leave its clip range the sooner the more units there are, by the root
    of their number; so a large model would hardly learn. Scaled, a step means the same in every model.
    """

    def log_prob(self, actions: Tensor) -> Tensor:
        """The scaled log probabilities [N] of decisions [N, units]."""
        scaled: Tensor = self.distribution.log_prob(actions).sum(dim=1) / actions.shape[1] ** 0.5
        return scaled

    def entropy(self) -> Tensor:
        """The mean entropy of a unit: [N]."""
        mean: Tensor = self.distribution.entropy().mean(dim=1)
        return mean


class UnitScorer(BaseFeaturesExtractor):  # type: ignore[misc]
    """From observations [N, STATE] to [N, units + 1]: the logit of keeping each unit, then the value of the state.

    The graph belongs to the problem, not to the weights.
    """

    def __init__(self, observation_space: spaces.Box, problem: Problem, units: Units) -> None:
        super().__init__(observation_space, len(units) + 1)
        graph = merged(problem.graph, units)
        edges, kinds = typed_edges(graph)
        for name, value in {"nodes": torch.from_numpy(graph.features), "edges": edges, "kinds": kinds}.items():
            self.register_buffer(name, value, persistent=False)
        self.units = len(units)
        self.encoder = GraphEncoder(self.nodes.shape[1])
        self.context = nn.Linear(WIDTH + STATE, WIDTH)
        self.score = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.logit = nn.Linear(WIDTH, 1)
        self.value = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, 1))
        nn.init.normal_(self.logit.weight, std=0.01)  # begin with the same chance for every unit
        nn.init.constant_(self.logit.bias, KEEP)

    def forward(self, observations: Tensor) -> Tensor:
        """Score every unit under each observation."""
        nodes = self.encoder(self.nodes, self.edges, self.kinds)
        pooled = nodes.mean(dim=0).expand(len(observations), WIDTH)
        context = self.context(torch.cat([pooled, observations], dim=1))
        units = nodes[len(nodes) - self.units :] + context[:, None, :]
        return torch.cat([self.logit(self.score(units))[:, :, 0], self.value(context)], dim=1)


class UnitPolicy(ActorCriticPolicy):  # type: ignore[misc]
    """An actor-critic whose logits and value all come from a `UnitScorer`; nothing is added behind it."""

    def __init__(self, *args: Any, problem: Problem, units: Units, **kwargs: Any) -> None:
        arguments = {"problem": problem, "units": units}
        super().__init__(*args, features_extractor_class=UnitScorer, features_extractor_kwargs=arguments, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.mlp_extractor = Split()
        self.action_dist = ManyCoins(self.action_space.n)
        self.action_net = nn.Identity()
        self.value_net = nn.Identity()
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class ResourceAware(Learner):
    """The agent; see the module's docstring."""

    name = "resource_aware"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search until the trials are spent or no new plan turns up."""
        if (plan := only_plan(problem)) is not None:
            problem.evaluate(plan)
            return
        search = Search(problem, rng, self._weights)
        try:
            search.warm_up()
            search.spend()
        finally:
            self._weights = weights_of(search.ppo.policy)


class Search:
    """One run: a policy, the multiplier, and the records of the plans it has tried."""

    def __init__(self, problem: Problem, rng: np.random.Generator, weights: Weights | None) -> None:
        self.problem = problem
        self.rng = rng
        self.units = Units(problem)
        self.multiplier = 0.0
        self.records: dict[Choices, Record] = {}
        self.per_round = int(np.clip(problem.trials // ROUNDS, 2, EPISODES))
        self.ceiling = 2 * problem.overrun(problem.dense)
        with reproducible(rng):
            self.ppo = self._ppo()
            if weights is not None:
                adopt(self.ppo.policy, weights)

    def _ppo(self) -> PPO:
        """SB3's PPO without an environment: what it would collect, `_learn` lays into its buffer."""
        ppo = PPO(
            UnitPolicy,
            None,
            learning_rate=1e-2,
            n_steps=1,
            batch_size=EPISODES,
            n_epochs=4,
            gamma=1.0,
            ent_coef=0.1,
            clip_range=0.2,
            normalize_advantage=False,
            policy_kwargs={"problem": self.problem, "units": self.units},
            device="cpu",
            _init_setup_model=False,
        )
        ppo.observation_space = spaces.Box(-10, 10, (STATE,), np.float32)
        ppo.action_space = spaces.MultiBinary(len(self.units))
        ppo.n_envs = EPISODES
        ppo._setup_model()
        ppo.set_logger(Logger(None, []))
        return ppo

    def observation(self) -> NDArray[np.float32]:
        """What the policy sees besides the graph, once for each episode: [EPISODES, STATE]."""
        excess = np.log(max(self.problem.overrun(self.problem.dense), 1e-3))
        row = np.array([np.clip(excess, -10, 10), self.multiplier / (1 + self.multiplier)])
        return np.tile(row.astype(np.float32), (EPISODES, 1))

    def warm_up(self) -> None:
        """Learn to meet the budget, which takes no trial."""
        for _ in range(WARM_UP):
            if self.round(0)[0] <= 1:
                return

    def spend(self) -> None:
        """Spend the trials, round by round, until none is left (BudgetSpent) or no new plan turns up."""
        stalls = 0
        while stalls < STALLS:
            _, tried = self.round(self.per_round)
            stalls = 0 if tried else stalls + 1

    def round(self, trials: int) -> tuple[float, int]:
        """Ask, evaluate up to `trials` of it, and learn; returns the mean overrun of what was asked, and the trials."""
        kept, values, chances = self._ask()
        overruns = self.overruns(kept)
        rewards = np.full(EPISODES, np.nan)
        before = len(self.records)
        if trials:
            rewards = self._compete(self.units.executed(kept), np.abs(overruns - 1), trials)
        self._learn(kept, values, chances, lagrangian(rewards, overruns, self.multiplier))
        self.multiplier = dual_ascent(self.multiplier, overruns)
        return float(overruns.mean()), len(self.records) - before

    def _ask(self) -> tuple[Bits, Tensor, Tensor]:
        """Decisions [EPISODES, units], with the values and log probabilities that PPO wants to know of them."""
        with reproducible(self.rng), torch.no_grad():
            kept, values, chances = self.ppo.policy(torch.from_numpy(self.observation()))
        return kept.numpy(), values, chances

    def overruns(self, kept: Bits) -> Floats:
        """Overruns [N] of what decisions [N, units] ask for; what is impossible counts as twice the dense model."""
        return np.minimum(self.problem.overruns(self.units.asked(kept)), self.ceiling)

    def _compete(self, plans: Vectors, order: Floats, trials: int) -> Floats:
        """Rewards of plans [N, sites], NaN where not evaluated: the new ones of the lowest order are.

        All compete with the best that was known before them.
        """
        own = [record for record in self.records.values() if record.feasible and record.error is None]
        accuracies = [record.accuracy for record in own if record.accuracy is not None]
        best = max(accuracies, default=None)
        rows = [tuple(row) for row in plans.tolist()]
        fresh = dict.fromkeys(rows[index] for index in order.argsort(kind="stable") if rows[index] not in self.records)
        for plan in list(fresh)[:trials]:
            self.records[plan] = self.problem.evaluate(plan)
        span = float(np.ptp(accuracies)) if accuracies else 0.0
        known = [self.records.get(row) for row in rows]
        return np.array([np.nan if one is None else self_competition(one, best, span) for one in known])

    def _learn(self, kept: Bits, values: Tensor, chances: Tensor, signal: Floats) -> None:
        """One PPO update on a round of episodes."""
        starts = np.ones(EPISODES, dtype=np.bool_)
        buffer = self.ppo.rollout_buffer
        buffer.reset()
        with reproducible(self.rng):
            buffer.add(self.observation(), kept, signal, starts, values, chances)
            buffer.compute_returns_and_advantage(torch.zeros(EPISODES), starts)
            self.ppo.train()
