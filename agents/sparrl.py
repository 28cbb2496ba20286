"""SparRL: deep Q-learning takes one cut after another, so that one trained agent serves every budget.

Wickman, Zhang, Li 2021, arXiv 2112.01565. From the paper: DQN with prioritised replay; a random sample of candidates,
scored one by one by a shared Q head; one cut per step; the change of the metric as reward; episodes that start anywhere
between untouched and 90 % pre-pruned.

Ours: a candidate is a (site, option) pair that costs less and leaves the target within reach. A model that is cut only
half cannot be evaluated here, since it misses the target, so the metric is known where an episode ends: there it is the
reward of the record or, for plans without one, what the belief says. On the way it is a line over the layers' errors
that is fitted to those ends. The rewards of an episode add up to the metric's change from its start to its end, so the
way between decides how fast the agent learns, not what is best. Each round evaluates the most promising of the agent's
greedy plan and of plans that are undone in part, which makes them pre-pruned models, and cut anew. One run may serve
several budgets: each has episodes of its own, and whatever meets the loosest counts as whole.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls
from stable_baselines3.dqn.policies import QNetwork

from graphprune.agents.belief import Belief, promise
from graphprune.agents.cutting import Cuts, Cutting, Observer, Vectors
from graphprune.agents.deep_q import learner, score
from graphprune.agents.policies import Learner, Weights, adopt, reproducible, weights_of
from graphprune.agents.wall import only_plan, passes
from graphprune.errors import InputError
from graphprune.searching.environment import reward
from graphprune.searching.problem import ROUNDING, Choices, Floats, Problem

EPISODES = 16
"""Episodes that are played side by side."""
WARM_UP = (12, 400)
"""Steps of all episodes before the first trial: for each site, at most."""
ROUNDS = 16
"""The trials are spent in about this many rounds."""
FEWEST = 4
"""Trials of a round, at least."""
ROUND_STEPS = (1, 30)
"""Steps of all episodes between two rounds: for each site, at most."""
STALLS = 4
"""The search ends after this many rounds in a row without a new plan."""
SHRINKAGE = 1.0
"""How strongly the layers' sensitivities are held at one common value, in plans."""
LEAST_FALL = 0.1
"""Error always counts at least as much as if it and the value had this correlation, with opposite signs."""
GENERATIONS = 4
"""How often the most promising plans are undone in part and cut anew."""
ELITES = 16
"""How many of them live on from generation to generation."""
VARIATIONS = 32
"""How many plans a generation makes of them."""
SHORTLIST = 2
"""Plans that are looked at more closely for each that is evaluated."""
CURIOSITY = 0.2
"""Chance of a random cut in a variation."""


class Worth:
    """The metric: of whole plans their values, standardised; of half-cut models a line over the layers' errors.

    Fitted to plans [N, sites] and their values [N]. The line has one sensitivity for each factor of the error: least
    squares, none negative, pulled towards one common slope. `error` is the problem's error with these sensitivities.
    """

    def __init__(self, problem: Problem, plans: Vectors, values: Floats) -> None:
        self._centre, self._scale = float(values.mean()), float(values.std()) + 1e-6
        parts = problem.error.parts(plans)
        total, standard = parts.sum(axis=1), self.standard(values)
        spread = max(float(total.std()), 0.01 * abs(float(total.mean())), 1e-9)
        fall = -float(((total - total.mean()) * standard).mean()) / spread  # the correlation, with its sign turned
        slope = max(fall, LEAST_FALL) / spread
        centred = slope * (parts - parts.mean(axis=0))
        pull = np.sqrt(SHRINKAGE) * np.eye(parts.shape[1])
        weights, _ = nnls(np.concatenate([centred, pull]), np.concatenate([-standard, pull.sum(axis=0)]))
        self.error = replace(problem.error.weighted(slope * weights), constant=0.0)
        self._top = float(self.error.batch(plans).mean())

    def standard(self, values: Floats) -> Floats:
        """Values of whole plans [N] as the metric: in standard deviations from the mean."""
        return (values - self._centre) / self._scale

    def halfway(self, choices: Vectors) -> Floats:
        """The metric of half-cut models [N, sites]: [N]."""
        return self._top - self.error.batch(choices)


def most_promising(belief: Belief, plans: Vectors, count: int) -> Vectors:
    """The `count` plans of some [N, sites] with the highest promise, each chosen as if those before it were known."""
    chosen = plans[:0]
    for _ in range(min(count, len(plans))):
        best = promise(belief, plans).argmax()
        chosen = np.concatenate([chosen, plans[[best]]])
        belief, plans = belief.supposing(plans[[best]]), np.delete(plans, best, axis=0)
    return chosen


@dataclass(frozen=True)
class Pruner:
    """What an agent knows, put to use for one target: whichever that is, network and belief are the same.

    `observer` holds the problem with that target.
    """

    network: QNetwork
    belief: Belief
    observer: Observer
    rng: np.random.Generator

    @property
    def cuts(self) -> Cuts:
        """The cuts that lead to the target."""
        return self.observer.cuts

    def greedy(self) -> Choices:
        """From dense, always the best of *all* open cuts until the target is met; the cheapest plan if none is."""
        cuts = self.cuts
        choices = np.array([cuts.problem.dense], dtype=np.int64)
        with self.network.features_extractor.unchanging():
            while not cuts.finished(choices)[0]:
                overruns = cuts.overruns(choices)
                opened = np.flatnonzero(cuts.open(choices, overruns)[0])
                if not len(opened):
                    return cuts.problem.cheapest
                best = score(self.network, self.observer.describe(choices, opened[None], overruns)).argmax()
                choices = cuts.take(choices, opened[[best]])
        return tuple(choices[0].tolist())

    def finish(self, starts: Vectors, curiosity: float) -> Vectors:
        """Cut on from choice vectors [N, sites] until the target is met; `curiosity` is the chance of a random cut."""
        cuts, choices = self.cuts, starts.copy()
        with self.network.features_extractor.unchanging():
            while len(short := np.flatnonzero(~cuts.finished(choices))):
                seen = self.observer.sample(choices[short], self.rng)
                best = score(self.network, seen).argmax(axis=1)
                wild = self.rng.random(len(short)) < curiosity
                action = np.where(wild, 0, best)  # the sample is in random order, so its first cut is a random one
                choices[short] = cuts.take(choices[short], seen["cuts"][np.arange(len(short)), action].astype(np.int64))
        return choices

    def breed(self, plans: Vectors) -> Vectors:
        """Plans [N, sites] and what the most promising become if they are undone in part and cut anew: [M, sites]."""
        bred = pool = plans
        for _ in range(GENERATIONS):
            pool = pool[np.argsort(-promise(self.belief, pool), kind="stable")[:ELITES]]
            anew = self.finish(self._undone(pool), CURIOSITY)
            pool = np.unique(np.concatenate([pool, anew]), axis=0)
            bred = np.unique(np.concatenate([bred, anew]), axis=0)
        return bred

    def _undone(self, plans: Vectors) -> Vectors:
        """Plans drawn from some [M, sites], each without a random share of its cuts: at most [VARIATIONS, sites].

        Those from which the target is no longer within reach are left out.
        """
        drawn = plans[self.rng.integers(len(plans), size=VARIATIONS)]
        kept = self.rng.random(drawn.shape) < self.rng.random((VARIATIONS, 1))
        undone = np.where(kept, drawn, 0)
        return undone[self.cuts.floors(undone) <= 1 + ROUNDING]

    def best(self) -> Choices:
        """The plan believed to be the best of the greedy one and those bred of it, without any evaluation."""
        problem = self.cuts.problem
        bred = self.breed(np.array([self.greedy()], dtype=np.int64))
        order = np.argsort(-self.belief.predict(bred)[0], kind="stable")
        ranked = (tuple(plan) for plan in bred[order].tolist())
        return next((plan for plan in ranked if passes(problem, plan)), problem.cheapest)


class SparRL(Learner):
    """One agent for all budgets: after a run, `curve` gives plans for budgets that it was not asked for."""

    name = "sparrl"

    def __init__(self) -> None:
        super().__init__()
        self._last: Search | None = None

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search until the trials are spent or no new plan turns up."""
        self.run_together([problem], rng)

    def run_together(self, problems: Sequence[Problem], rng: np.random.Generator) -> None:
        """One run for several problems that differ in their limits alone, each with trials of its own."""
        asked = []
        for problem in problems:
            only = problem.dense if problem.feasible(problem.dense) else only_plan(problem)
            if only is None:
                asked.append(problem)
            else:
                problem.evaluate(only)
        if not asked:
            return
        search = self._last = Search(asked, rng, self._weights)
        try:
            search.learn(*WARM_UP)
            search.spend()
        finally:
            self._weights = weights_of(search.dqn.policy)

    def curve(self, problem: Problem, limits: Sequence[Mapping[str, float]], rng: np.random.Generator) -> list[Choices]:
        """A plan for each of several `limits` (as in `Problem.limits`): the trade-off curve, without any evaluation.

        On a problem of the last run all that its records taught counts; on another problem, whose dense model must
        miss its own target, the policy and the error table. Where no plan meets the limits it is the cheapest one.
        Raises InputError before the first run, unless a policy was loaded.
        """
        if self._weights is None:
            raise InputError("the agent has no policy yet: run it, or load one")
        search = self._last
        if search is None or all(problem is not known for known in search.problems):
            search = Search([problem], rng, self._weights)
        others = [replace(problem, limits=limit, records=[], _seen={}) for limit in limits]
        observers = [Observer(Cuts(other, search.worth.error)) for other in others]
        return [Pruner(search.dqn.q_net, search.belief, observer, rng).best() for observer in observers]


class Search:
    """One run: a Q network, what is believed of plans, and those that were tried.

    Of several problems, the last one is the tightest, which dense misses by most.
    """

    def __init__(self, problems: Sequence[Problem], rng: np.random.Generator, weights: Weights | None) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.overrun(problem.dense))
        self.rng = rng
        tightest = self.problems[-1]
        self.belief = Belief(tightest)
        self.rewards: dict[Choices, float] = {}
        observers = [Observer(Cuts(problem, tightest.error)) for problem in self.problems]
        self.episodes = Cutting(observers, EPISODES, self.metric, rng)
        with reproducible(rng):
            self.dqn = learner(self.episodes, rng)
        if weights is not None:
            adopt(self.dqn.policy, weights)
        self.pruners = [Pruner(self.dqn.q_net, self.belief, observer, rng) for observer in observers]
        last = self.pruners[-1]
        self._understand(last.finish(last.cuts.starts(VARIATIONS, rng), curiosity=1.0))

    def metric(self, choices: Vectors) -> Floats:
        """What whole or half-cut models [N, sites] are worth: [N]."""
        worth = self.worth.halfway(choices)
        if (done := self.pruners[0].cuts.finished(choices)).any():
            worth[done] = self.worth.standard(self._values(choices[done]))
        return worth

    def _values(self, plans: Vectors) -> Floats:
        """Rewards of whole plans [N, sites]: as evaluated where they were, as believed elsewhere."""
        believed, _ = self.belief.predict(plans)
        known = zip(map(tuple, plans.tolist()), believed, strict=True)
        return np.array([self.rewards.get(plan, value) for plan, value in known])

    def _understand(self, plans: Vectors) -> None:
        """Fit the metric to what is known of plans; transitions that were judged by the one before are forgotten."""
        self.worth = Worth(self.problems[-1], plans, self._values(plans))
        for pruner in self.pruners:
            pruner.cuts.describe_by(self.worth.error)
        self.dqn.replay_buffer.reset()
        self.dqn.set_env(self.episodes, force_reset=True)

    def learn(self, for_each_site: int, at_most: int) -> None:
        """Play and train in imagination, for so many steps of all episodes."""
        steps = min(for_each_site * len(self.problems[-1].decisions), at_most)
        with reproducible(self.rng):
            self.dqn.learn(steps * EPISODES, log_interval=None, reset_num_timesteps=False)

    def spend(self) -> None:
        """Spend the trials, round by round, until none is left or no new plan turns up."""
        stalls = 0
        while stalls < STALLS and any(problem.remaining for problem in self.problems):
            ends = list(self.episodes.finished)
            self.episodes.finished.clear()
            rounds = [self._round(pruner, ends) for pruner in self.pruners]
            stalls = 0 if any(tried for tried, _ in rounds) else stalls + 1
            self._understand(np.unique(np.concatenate([bred for _, bred in rounds]), axis=0))
            self.learn(*ROUND_STEPS)

    def _round(self, pruner: Pruner, ends: Sequence[Choices]) -> tuple[int, Vectors]:
        """Evaluate promising plans of a problem: how many, and among which [N, sites]; `ends` are those of episodes.

        What is known of plans at other budgets counts as well: those still short of this one are cut on.
        """
        cuts, problem = pruner.cuts, pruner.cuts.problem
        count = max(math.ceil(FEWEST / len(self.problems)), problem.trials // ROUNDS)
        greedy = pruner.greedy()
        known = np.unique(np.array([greedy, problem.cheapest, *self.rewards, *ends]), axis=0)
        known = pruner.finish(known[cuts.finished(known) | (cuts.floors(known) <= 1 + ROUNDING)], curiosity=0.0)
        tried = self._try(problem, np.array([greedy]), 1)
        bred = pruner.breed(known)
        return tried + self._try(problem, bred, count - tried), bred

    def _try(self, problem: Problem, plans: Vectors, count: int) -> int:
        """Evaluate the `count` most promising new plans of some [N, sites]; returns how many there were."""
        fresh = plans[[plan not in self.rewards for plan in map(tuple, plans.tolist())]]
        count = min(count, problem.remaining)
        ranked = fresh[np.argsort(-promise(self.belief, fresh), kind="stable")[: SHORTLIST * count]]
        legal = ranked[[passes(problem, plan) for plan in ranked.tolist()]]
        if not len(legal):
            return 0
        chosen = most_promising(self.belief, legal, count)
        for plan in map(tuple, chosen.tolist()):
            self.rewards[plan] = reward(problem, problem.evaluate(plan), plan)
        self.belief.learn(chosen, np.array([self.rewards[plan] for plan in map(tuple, chosen.tolist())]))
        return len(chosen)
