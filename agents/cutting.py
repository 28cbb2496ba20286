"""Pruning as one cut after another, in any order, until the target is met: the episodes of SparRL.

Wickman, Zhang, Li 2021 (arXiv 2112.01565) remove one edge of a graph at a time, chosen among a random sample of them,
from graphs of which a random part is gone already. Here a cut sets one site to an option that costs less.
"""

from collections.abc import Callable, Sequence

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from graphprune.agents.lockstep import LockStep
from graphprune.searching.environment import NEVER
from graphprune.searching.problem import ROUNDING, Floats, Problem, Sum

SAMPLE = 64
"""Cuts that one observation offers (SparRL's |H|)."""
CUT_FEATURES = 7
SITUATION_FEATURES = 4
BOUND = 10.0
"""Features are clipped to this range."""
PRE_PRUNED = 0.9
"""Episodes start anywhere up to this share of the way from dense to the target (SparRL's T_p)."""
Vectors = NDArray[np.int64]
Metric = Callable[[Vectors], Floats]
"""What whole or half-cut models [N, sites] are worth: [N]."""
Situations = dict[str, NDArray[np.float32] | NDArray[np.int64]]


class Lookup:
    """A sum in which all cuts of many choice vectors are looked up at once.

    `Sum.sweep` changes one site at a time; an episode needs all sites at every step. An *entry* is a cut and a factor
    that it changes; entries are in the order of the cuts.
    """

    def __init__(self, total: Sum, sites: Vectors, options: Vectors, count: int) -> None:
        """For cuts that set `sites` [P] to `options` [P], in choice vectors of `count` sites."""
        self.total = total
        strides = total.strides(count)
        self._cut, self._factor = np.nonzero(strides[sites])
        self._site, self._option = sites[self._cut], options[self._cut]
        self._stride = strides[self._site, self._factor]
        self._changed, self._first = np.unique(self._cut, return_index=True)
        self._cuts = len(sites)

    def after(self, choices: Vectors) -> Floats:
        """The sum after each cut of choice vectors [N, sites]: [N, P]; NaN where it is infinite before."""
        places = self.total.places(choices)
        before = self.total.flat[places]
        moved = places[:, self._factor] + (self._option - choices[:, self._site]) * self._stride
        values = np.repeat(self.total.constant + before.sum(axis=1)[:, None], self._cuts, axis=1)
        with np.errstate(invalid="ignore"):
            changes = self.total.flat[moved] - before[:, self._factor]
            if len(self._changed):
                values[:, self._changed] += np.add.reduceat(changes, self._first, axis=1)
        return values


class Cuts:
    """Every cut that may follow a choice vector, and what it would change, for many vectors at once.

    A cut is a (site, option) pair, numbered 0 to P - 1: `sites[cut]` and `options[cut]`. `error` is the sum by which
    cuts are described; it may be another than the problem's.

    A cut is open if it lowers the overrun and the target stays within reach: with every site that is still dense as in
    one of the problem's completions. A completion's own cuts of dense sites are open even where they save nothing by
    themselves. So a vector that is short of the target always has an open cut, and no walk comes back to where it was.
    """

    def __init__(self, problem: Problem, error: Sum) -> None:
        self.problem = problem
        self.counts = [len(decision.options) - 1 for decision in problem.decisions]
        self.sites = np.repeat(np.arange(len(self.counts)), self.counts)
        self.options = np.concatenate([np.arange(1, count + 1) for count in self.counts])
        ends = np.cumsum(self.counts)
        self._costs = [(self._lookup(problem.costs[name]), limit) for name, limit in problem.limits.items()]
        self.describe_by(error)
        self._completions = np.array(problem.completions, dtype=np.int64)
        dense = np.array([problem.dense], dtype=np.int64)
        useful = self.open(dense, self.overruns(dense))[0]
        columns = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        self._menus = [self.options[column][useful[column]] for column in columns]

    def _lookup(self, total: Sum) -> Lookup:
        return Lookup(total, self.sites, self.options, len(self.counts))

    def describe_by(self, error: Sum) -> None:
        """Describe cuts by another error."""
        self.error = error
        self._error = self._lookup(error)

    def overruns(self, choices: Vectors) -> Floats:
        """The overrun after each cut of choice vectors [N, sites]: [N, P]."""
        return np.asarray(np.max([cost.after(choices) / limit for cost, limit in self._costs], axis=0))

    def errors(self, choices: Vectors) -> Floats:
        """The error that each cut of choice vectors [N, sites] adds: [N, P]."""
        return self._error.after(choices) - self.error.batch(choices)[:, None]

    def completed(self, choices: Vectors) -> Vectors:
        """Choice vectors [N, sites] with what is dense as in each completion: [completions, N, sites]."""
        return np.where(choices[None] > 0, choices[None], self._completions[:, None])

    def floors(self, choices: Vectors) -> Floats:
        """The least overrun that completing choice vectors [N, sites] leads to: [N]."""
        return np.asarray(np.min([self.problem.overruns(completed) for completed in self.completed(choices)], axis=0))

    def finished(self, choices: Vectors) -> NDArray[np.bool_]:
        """Which choice vectors [N, sites] meet the target, by prediction: [N]."""
        return np.asarray(self.problem.overruns(choices) <= 1 + ROUNDING)

    def open(self, choices: Vectors, overruns: Floats) -> NDArray[np.bool_]:
        """Which cuts are open [N, P], given the overruns after them [N, P]."""
        lowers = overruns < self.problem.overruns(choices)[:, None] * (1 - ROUNDING)
        opened: NDArray[np.bool_] = np.zeros(overruns.shape, dtype=np.bool_)
        for completed in self.completed(choices):
            completes = (choices == 0)[:, self.sites] & (completed[:, self.sites] == self.options)
            opened |= (lowers | completes) & (self.overruns(completed) <= 1 + ROUNDING)
        return opened & ~self._gone(choices)[:, self.sites]

    def _gone(self, choices: Vectors) -> NDArray[np.bool_]:
        """At which sites there is nothing left to decide: [N, sites]."""
        return np.asarray((choices > 0) @ self.problem.inside)

    def take(self, choices: Vectors, cuts: Vectors) -> Vectors:
        """Choice vectors [N, sites] after one cut each [N]."""
        after = choices.copy()
        after[np.arange(len(cuts)), self.sites[cuts]] = self.options[cuts]
        after[self._gone(after)] = 0
        return after

    def starts(self, count: int, rng: np.random.Generator) -> Vectors:
        """Choice vectors [count, sites] from which the target can be met, random cuts being made already.

        Each is as near as its cuts allow to a share of the way from dense to the target that is drawn uniformly from 0
        to `PRE_PRUNED`, and none lies beyond.
        """
        starts = [self._start(rng.uniform(0, PRE_PRUNED), rng) for _ in range(count)]
        return np.concatenate([np.zeros((0, len(self.counts)), dtype=np.int64), *starts])

    def _start(self, share: float, rng: np.random.Generator) -> Vectors:
        """Cut site after site at random, and go back to the vector that is nearest to the share: [1, sites]."""
        drawn = np.array([rng.choice(menu) if len(menu) else 0 for menu in self._menus])
        rank = rng.permutation(len(drawn))
        walk = np.where(rank[None, :] < np.arange(len(drawn) + 1)[:, None], drawn, 0)
        walk[self._gone(walk)] = 0
        overruns = self.problem.overruns(walk)
        shares = (overruns[0] - overruns) / (overruns[0] - 1)
        fit = (shares <= PRE_PRUNED) & (self.floors(walk) <= 1 + ROUNDING)
        return walk[[np.where(fit, np.abs(shares - share), np.inf).argmin()]]


class Observer:
    """Describes situations: a choice vector and some of the cuts that are open there.

    Figures are in units of the dense model (costs) and of `error`, so that they mean the same whatever the target is.
    """

    def __init__(self, cuts: Cuts) -> None:
        self.cuts = cuts
        self._dense = float(cuts.problem.overruns(np.array([cuts.problem.dense], dtype=np.int64))[0])

    @property
    def space(self) -> spaces.Dict:
        """The space of one situation."""
        widest = 1 + max(self.cuts.counts)
        sites = len(self.cuts.counts)
        return spaces.Dict(
            {
                "decided": spaces.Box(0, widest - 1, (sites,), np.int64),
                "situation": spaces.Box(-BOUND, BOUND, (SITUATION_FEATURES,), np.float32),
                "cuts": spaces.Box(0, len(self.cuts.sites) - 1, (SAMPLE,), np.int64),
                "values": spaces.Box(-BOUND, BOUND, (SAMPLE, CUT_FEATURES), np.float32),
            }
        )

    def sample(self, choices: Vectors, rng: np.random.Generator) -> Situations:
        """Situations of choice vectors [N, sites] short of the target, with `SAMPLE` random cuts each.

        Where fewer are open they come up again, so that every action stands for an open cut.
        """
        overruns = self.cuts.overruns(choices)
        opened = self.cuts.open(choices, overruns)
        order = np.argsort(np.where(opened, rng.random(opened.shape), 2.0), axis=1)
        picked = np.arange(SAMPLE) % np.minimum(opened.sum(axis=1), SAMPLE)[:, None]
        return self.describe(choices, np.take_along_axis(order, picked, axis=1), overruns)

    def describe(self, choices: Vectors, cuts: Vectors, overruns: Floats) -> Situations:
        """Situations of choice vectors [N, sites] with given cuts [N, K], given the overruns after every cut [N, P]."""
        now, floor = np.minimum(self.cuts.problem.overruns(choices), NEVER), self.cuts.floors(choices)
        gap = np.maximum(now - 1, 1e-9)
        situation = np.stack(
            [gap / self._dense, np.log(gap / self._dense + 1e-3), now - floor, gap / np.maximum(now - floor, 1e-9)], 1
        )
        added = np.take_along_axis(self.cuts.errors(choices), cuts, axis=1)
        after = np.nan_to_num(np.take_along_axis(overruns, cuts, axis=1), nan=NEVER, posinf=NEVER)
        saved = now[:, None] - after
        size = np.log(np.maximum(added, 0) + 1e-3)
        share = np.log(np.maximum(saved / self._dense, 0) + 1e-4)
        closed = np.minimum(saved / gap[:, None], 1.0)
        useful = np.log(np.maximum(np.minimum(saved, gap[:, None]) / self._dense, 0) + 1e-4)
        left = np.maximum(after - 1, -1)
        values = np.stack([added, size / 3, share / 3, closed, left, (size - share) / 3, (size - useful) / 3], axis=2)
        return {
            "decided": choices,
            "situation": np.clip(situation, -BOUND, BOUND).astype(np.float32),
            "cuts": cuts,
            "values": np.clip(values, -BOUND, BOUND).astype(np.float32),
        }


class Cutting(LockStep):
    """Episodes of cuts for Stable-Baselines3: an action takes one of the `SAMPLE` cuts that are offered.

    An episode begins at one of `Cuts.starts` and ends when the target is met. The reward is the change of the metric.
    Where there are several targets, each has an observer, and an equal share of the episodes.
    """

    def __init__(self, observers: Sequence[Observer], count: int, metric: Metric, rng: np.random.Generator) -> None:
        super().__init__(count, observers[0].space, spaces.Discrete(SAMPLE))
        self.observers = observers
        self.metric = metric
        self.finished: list[tuple[int, ...]] = []
        self._rng = rng
        self._seen: Situations = {}
        self._actions = np.zeros(count, dtype=np.int64)

    def reset(self) -> Situations:
        """Start all episodes."""
        counts = [len(own) for own in self._shared(np.arange(self.num_envs))]
        starts = [observer.cuts.starts(own, self._rng) for observer, own in zip(self.observers, counts, strict=True)]
        return self._see(starts)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Keep the actions [N] for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Situations, Floats, NDArray[np.bool_], list[dict[str, object]]]:
        """Take the cuts. Where the target is met the plan is kept in `finished`, and a new episode starts."""
        before: Vectors = self._seen["decided"].astype(np.int64)
        taken: Vectors = self._seen["cuts"][np.arange(self.num_envs), self._actions].astype(np.int64)
        stepped = [
            self._step(observer.cuts, *own)
            for observer, *own in zip(self.observers, self._shared(before), self._shared(taken), strict=True)
        ]
        after, rewards, done = zip(*stepped, strict=True)
        return self._see(after), np.concatenate(rewards), np.concatenate(done), [{} for _ in range(self.num_envs)]

    def _step(self, cuts: Cuts, before: Vectors, taken: Vectors) -> tuple[Vectors, Floats, NDArray[np.bool_]]:
        """Where the episodes of one target go on, what they get, and which of them ended."""
        after = cuts.take(before, taken)
        rewards: Floats = np.subtract(self.metric(after), self.metric(before))
        done = cuts.finished(after)
        self.finished += map(tuple, after[done].tolist())
        after[done] = cuts.starts(int(done.sum()), self._rng)
        return after, rewards, done

    def _shared(self, whole: Vectors) -> list[Vectors]:
        """What belongs to the episodes [N, ...], for each target."""
        return np.array_split(whole, len(self.observers))

    def _see(self, choices: Sequence[Vectors]) -> Situations:
        pairs = zip(self.observers, choices, strict=True)
        seen = [observer.sample(own, self._rng) for observer, own in pairs if len(own)]
        self._seen = {name: np.concatenate([one[name] for one in seen]) for name in seen[0]}
        return self._seen
